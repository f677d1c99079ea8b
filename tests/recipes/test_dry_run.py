"""The dry run: its numbers are what then happens, and the model is not touched."""

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify import Pruner, Recipe, SparseLinear
from sparsify.recipes.dry_run import plan


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 40), nn.ReLU(), nn.Linear(40, 20), nn.Linear(20, 8, bias=False))


GROUPS = {
    "uniform": {"sparsity": 0.9},
    "erk": {"sparsity": 0.9, "allocation": "erk"},
    "global": {"sparsity": 0.9, "allocation": "global"},
    "each": {"allocation": {"0": 0.95, "*": 0.3}},
    "2:4": {"pattern": "2:4"},
    "blocks": {"sparsity": 0.5, "pattern": "4x1"},
    "rows": {"sparsity": 0.5, "pattern": "rows"},
    "columns": {"sparsity": 0.3, "pattern": "columns"},
    "random": {"sparsity": 0.7, "method": "random", "seed": 3},
    "nothing": {"sparsity": 0.0},
    "everything": {"sparsity": 1.0},
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_is_what_happens(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    recipe = Recipe(groups=[GROUPS[name]])
    planned = plan(recipe, net().to(dtype))
    model = sparsify.apply(sparsify.convert(net().to(dtype)), recipe)
    sparsify.save(model, tmp_path / "model.safetensors")
    stored = {row.name: row for row in sparsify.inspect(tmp_path / "model.safetensors")}
    assert [x.name for x in planned] == ["0", "2", "3"] == list(stored)
    for x in planned:
        assert x.shape == stored[x.name].shape
        assert x.targets[-1][1] == pytest.approx(stored[x.name].sparsity, abs=1e-12)
        assert x.n_bytes == stored[x.name].n_bytes
        assert x.dense_bytes == stored[x.name].dense_bytes
        assert x.ranked == (name == "global")


@pytest.mark.parametrize("name", ["uniform", "each", "nothing"])
def test_the_plan_counts_int8(tmp_path: Path, name: str) -> None:
    recipe = Recipe(groups=[GROUPS[name]], quantize="int8")
    model = sparsify.apply(sparsify.convert(net()), recipe)
    fast = sparsify.export(model, format="csr", quantize=recipe.quantize)
    sparsify.save(fast, tmp_path / "model.safetensors")
    stored = {row.name: row for row in sparsify.inspect(tmp_path / "model.safetensors")}
    for x in plan(recipe, net()):
        assert x.dense_bytes == stored[x.name].dense_bytes
        # a kept weight that was rounded to zero keeps a layer from the format without a mask
        assert 0 <= stored[x.name].n_bytes - x.n_bytes <= (x.shape[0] * x.shape[1] + 7) // 8


@pytest.mark.parametrize("kind", ["linear", "polynomial", "exponential", "cosine"])
def test_every_update_of_a_schedule_is_planned(kind: str) -> None:
    schedule = {"kind": kind, "start": 1, "end": 4, "every": 1, "initial": 0.2}
    recipe = Recipe(groups=[{"sparsity": 0.9, "schedule": schedule}])
    planned = plan(recipe, net())
    assert [[time for time, _ in x.targets] for x in planned] == [[1.0, 2.0, 3.0, 4.0]] * 3
    model = sparsify.convert(net())
    pruner = Pruner(model, recipe)
    for i in range(4):
        pruner.step()
        found = [layer.sparsity for layer in model if isinstance(layer, SparseLinear)]
        assert found == pytest.approx([x.targets[i][1] for x in planned])
    assert found == pytest.approx([0.9, 0.9, 0.9], abs=1e-2)


def test_dense_phases_are_planned_for_every_pattern() -> None:
    schedule = {"kind": "alternating", "end": 3, "every": 1}
    for group in ({"pattern": "2:4"}, {"sparsity": 0.5}):
        recipe = Recipe(groups=[{**group, "schedule": schedule}])
        assert plan(recipe, net())[0].targets == ((0.0, 0.5), (1.0, 0.0), (2.0, 0.5), (3.0, 0.5))
        pruner = Pruner(sparsify.convert(net()), recipe)
        pruner.step()
        assert pruner.sparsity == 0.0


def test_a_seed_for_growth_alone_can_be_planned() -> None:
    grow = {"seed": 1, "regrow": {"by": "random"}, "schedule": {"end": 2, "every": 1}}
    recipe = Recipe(groups=[{"sparsity": 0.5, "allocation": "global", **grow}])
    assert sum(layer.targets[-1][1] * layer.shape[0] * layer.shape[1] for layer in plan(recipe, net())) == 6480


def test_nothing_is_touched_and_both_kinds_of_model_give_one_plan() -> None:
    model, converted = net(), sparsify.convert(net())
    recipe = Recipe(groups=[GROUPS["global"]])
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    random = torch.random.get_rng_state()
    assert plan(recipe, model) == plan(recipe, converted)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert all(layer.mask.all() for layer in converted if isinstance(layer, SparseLinear))


def test_a_model_on_the_meta_device_can_be_planned() -> None:
    model = net().to("meta")
    assert plan(Recipe(groups=[GROUPS["uniform"]]), model) == plan(Recipe(groups=[GROUPS["uniform"]]), net())
    with pytest.raises(ValueError, match="0: the weight is on the meta device"):
        plan(Recipe(groups=[GROUPS["global"]]), model)


def test_what_stops_the_recipe_stops_the_plan() -> None:
    with pytest.raises(ValueError, match=r"groups\.0: .*matches no layer"):
        plan(Recipe(groups=[{"sparsity": 0.5, "layers": ["nothing"]}]), net())
    with pytest.raises(ValueError, match="divisible by 7"):
        plan(Recipe(groups=[{"pattern": "1:7"}]), net())

"""recover with masks that move: counts and patterns hold, the loss falls further, and nothing is left behind."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.cli import main
from sparsify.conversion.convert import sparse_layers
from sparsify.masking.patterns import expand_units, parse_pattern, unit_any
from sparsify.pruning.moving_masks import INTERVAL
from sparsify.pruning.recover import recover

DATA = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
PATTERNS = ["unstructured", "2:4", "1x4", "4x1", "rows", "columns"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


def pruned(pattern: str = "unstructured", sparsity: float | None = 0.75) -> tuple[nn.Module, nn.Module]:
    """A model pruned at random, so that better masks exist, and its teacher."""
    model = sparsify.convert(net())
    teacher = copy.deepcopy(model)
    exact = None if pattern == "2:4" else sparsity
    return sparsify.prune(model, exact, method="random", pattern=pattern, seed=0), teacher


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.mask.clone() for name, layer in sparse_layers(model).items()}


def distance(model: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((model(x) - teacher(x)).square().sum()) for x in DATA)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_move_and_keep_their_counts_and_pattern(pattern: str) -> None:
    model, teacher = pruned(pattern)
    before = masks(model)
    recover(model, teacher, DATA, steps=10 * INTERVAL, lr=1e-2, move=pattern)
    after = masks(model)
    assert pattern in ("rows", "columns") or any(not torch.equal(after[name], before[name]) for name in before)
    parsed = parse_pattern(pattern)
    for name, mask in after.items():
        assert int(mask.sum()) == int(before[name].sum())
        if parsed.is_nm:
            assert bool((mask.view(-1, parsed.group).sum(1) == parsed.keep).all())
        else:
            assert torch.equal(mask, expand_units(unit_any(mask, parsed), parsed, mask.shape))
    for layer in sparse_layers(model).values():
        assert layer.masked_mode == "zero"
        assert bool((layer.weight[~layer.mask] == 0).all())
        assert bool(layer.weight[layer.mask].all())


def test_masks_that_move_come_nearer() -> None:
    """From masks drawn at random, the same steps leave less of the error."""
    errors = {}
    for move in (None, "unstructured"):
        model, teacher = pruned()
        recover(model, teacher, DATA, steps=40 * INTERVAL, lr=3e-3, move=move)
        errors[move] = distance(model, teacher)
    assert errors["unstructured"] < 0.7 * errors[None]  # type: ignore[operator]


def test_the_same_steps_give_the_same_masks(one_thread: None) -> None:
    results = []
    for _ in range(2):
        model, teacher = pruned()
        results.append(recover(model, teacher, DATA, steps=5 * INTERVAL, lr=1e-2, move="unstructured").state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_layers_without_a_pattern_hold_their_masks() -> None:
    model, teacher = pruned()
    before = masks(model)
    recover(model, teacher, DATA, steps=10 * INTERVAL, lr=1e-2, move={"2": "unstructured"})
    after = masks(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["2"]


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.filterwarnings("ignore::sparsify.RemovedLayerWarning")
def test_a_mask_that_keeps_all_or_nothing_has_nowhere_to_go(sparsity: float) -> None:
    model, teacher = pruned(sparsity=sparsity)
    before = masks(model)
    recover(model, teacher, DATA, steps=2 * INTERVAL, move="unstructured")
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())


def test_after_an_error_masks_and_modes_are_as_before() -> None:
    model, teacher = pruned()
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the loss became (nan|inf)"):
        recover(model, teacher, DATA, steps=10 * INTERVAL, lr=1e30, move="unstructured")
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert {layer.masked_mode for layer in sparse_layers(model).values()} == {"zero"}


def test_what_cannot_be_is_an_error_before_anything_changes() -> None:
    model, teacher = pruned()
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0: its mask is not of the pattern '2:4'; give move="):
        recover(model, teacher, DATA, steps=1, move="2:4")
    with pytest.raises(ValueError, match=r"2: its mask is not of the pattern '1x4'"):
        recover(model, teacher, DATA, steps=1, move={"0": "unstructured", "2": "1x4"})
    with pytest.raises(ValueError, match=r"'nowhere' matches no layer"):
        recover(model, teacher, DATA, steps=1, move={"nowhere": "unstructured"})
    with pytest.raises(ValueError, match=r"pattern 'some' is none of"):
        recover(model, teacher, DATA, steps=1, move="some")
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_a_recipe_moves_masks_within_the_pattern_of_each_group() -> None:
    model = sparsify.convert(net())
    groups = [
        {"layers": ["0"], "sparsity": 0.5, "method": "random", "seed": 0},
        {"layers": ["2"], "pattern": "1x4", "sparsity": 0.5, "method": "random", "seed": 0},
        {"layers": ["4"], "method": "hold"},
    ]
    recipe = sparsify.Recipe.model_validate(
        {"groups": groups, "recover": {"steps": 5 * INTERVAL, "lr": 1e-2, "move": True}}
    )
    model[4].sparse_update(0.5)
    held = model[4].mask.clone()
    plain = sparsify.apply(copy.deepcopy(model), recipe.model_copy(update={"recover": None}))
    sparsify.apply(model, recipe, data=DATA)
    assert torch.equal(model[4].mask, held)
    for number in (0, 2):
        mask = model[number].mask
        assert int(mask.sum()) * 2 == mask.numel()
        assert not torch.equal(mask, plain.get_submodule(str(number)).mask)
    assert bool((model[2].mask.view(32, 8, 4).sum(2) % 4 == 0).all())


def test_move_needs_a_recovery(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["compress", "--model", "torchvision:resnet18", "--out", "x.safetensors", "--move"]
    assert main([*common, "--sparsity", "0.5"]) == 2
    assert "--move is for the tuning of --recover" in capsys.readouterr().err
    assert main([*common, "--recipe", "magnitude-50"]) == 2
    assert "write 'recover: {move: true}' in the recipe" in capsys.readouterr().err
    assert not Path("x.safetensors").exists()

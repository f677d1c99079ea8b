"""Experts of transformers on calibration data, each on the tokens that reached it, and their exports by kernels."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.inference.form_selection import FormSelector
from sparsify.layers.held_weight import CSRHeldWeight, SparseHeldWeight
from sparsify.masking.layer_solve import prune_layer
from sparsify.masking.spec import PruningSpec

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
CONFIGS = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "GptOss": {"intermediate_size": 48, "num_local_experts": 4},
}
IDS = torch.randint(64, (3, 10), generator=torch.Generator().manual_seed(0))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | CONFIGS[name])
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    return model


def held(model: nn.Module) -> dict[str, SparseHeldWeight]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseHeldWeight)}


def rows_of_experts(model: nn.Module, name: str) -> list[Tensor]:
    """Return the rows that each expert of the first layer multiplies, by code of this test."""
    experts: Any = model.get_submodule(name.rpartition(".")[0])
    found: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda module, args: found.append(args[:2]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    ((hidden, chosen),) = found
    return [hidden[(chosen == number).any(-1)] for number in range(4)]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_each_expert_is_pruned_on_the_tokens_that_reached_it(name: str, method: str) -> None:
    model = sparsify.convert(build(name), functional=True)
    dense = copy.deepcopy(model)
    sparsify.prune(model, 0.5, method=method, data=[{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}])
    assert all(layer.sparsity == pytest.approx(0.5, abs=1e-3) for layer in held(model).values())
    assert len(held(model)) == 4
    first, layer = next((key, one) for key, one in held(model).items() if "layers.0" in key and "gate_up" in key)
    for key, own in model.model.layers[0].named_modules():  # the experts' inputs come from pruned layers before
        if isinstance(own, sparsify.SparseLinear):
            dense.model.layers[0].get_submodule(key).load_state_dict(own.state_dict())
    rows = rows_of_experts(dense, first)
    assert len({len(part) for part in rows}) > 1
    weight = dense.get_submodule(first).weight.detach()
    n_removed = weight[0].numel() // 2
    for number, part in enumerate(rows):
        gram = part.double().T @ part.double()
        spec = PruningSpec(0.5, method).for_layer(n_removed)
        wanted, mask = prune_layer("", weight[number], torch.ones(weight[0].shape, dtype=torch.bool), spec, gram)
        assert (layer.mask[number] == mask).float().mean() > 0.999
        torch.testing.assert_close(layer.weight[number].detach(), wanted.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_a_measured_allocation_is_one_of_experts(method: str) -> None:
    model = sparsify.convert(build("Mixtral"), functional=True, include="re:.*experts.*")
    with torch.no_grad():  # an expert of equal columns loses little with half of them
        model.model.layers[0].mlp.experts.gate_up_proj_layer.weight[1, :, 16:] *= 1e-3
    data = [{"input_ids": IDS}]
    sparsify.prune(model, 0.5, method=method, allocation="error", data=data)
    layers = held(model)
    assert sum(int(one.mask.sum()) for one in layers.values()) == sum(one.mask.numel() for one in layers.values()) // 2
    kept = layers["model.layers.0.mlp.experts.gate_up_proj_layer"].mask.flatten(1).float().mean(1).tolist()
    assert kept[1] == min(kept) < max(kept)


def test_an_expert_without_tokens_is_told() -> None:
    model = sparsify.convert(build("Mixtral"), functional=True)
    router: Any = model.model.layers[1].mlp.gate
    handle = router.register_forward_hook(_without_second)
    with pytest.warns(sparsify.UnseenExpertsWarning) as found:
        sparsify.prune(model, 0.5, method="wanda", data=[{"input_ids": IDS}])
    handle.remove()
    told = sorted(str(warning.message) for warning in found if warning.category is sparsify.UnseenExpertsWarning)
    assert [text.split(":")[0] for text in told] == [
        f"model.layers.1.mlp.experts.{key}_proj_layer" for key in ("down", "gate_up")
    ]
    assert "1 of 4 matrices (2) got no rows of the calibration data" in told[0]
    layer = held(model)["model.layers.1.mlp.experts.gate_up_proj_layer"]
    dense = build("Mixtral").model.layers[1].mlp.experts.gate_up_proj[2].abs()
    smallest = dense.sort(dim=1).indices[:, :16]
    assert not layer.mask[2].gather(1, smallest).any()  # Wanda of equal inputs: the smallest weights of each row


def _without_second(module: nn.Module, args: Any, output: Any) -> Any:
    """Send the tokens of expert 2 to expert 3."""
    *others, chosen = output
    return (*others, torch.where(chosen == 2, 3, chosen))


@pytest.mark.parametrize("form", ["csr", "panel", "gather"])
@pytest.mark.parametrize("name", CONFIGS)
def test_exported_experts_run_by_kernels(name: str, form: str, tmp_path: Path) -> None:
    model = sparsify.prune(sparsify.convert(build(name), functional=True), 0.7)
    expected = model(IDS).logits
    fast = sparsify.export(model, format=form)
    experts = fast.model.layers[0].mlp.experts
    assert {type(layer) for key, layer in experts.named_children() if key.endswith("_layer")} == {CSRHeldWeight}
    calls: list[tuple[int, ...]] = []
    handle = experts.down_proj_layer.register_forward_hook(lambda _, args, y: calls.append((args[1], *y.shape)))
    torch.testing.assert_close(fast(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert [call[0] for call in calls] == sorted({call[0] for call in calls})
    assert {call[2] for call in calls} == {32}
    assert sum(call[1] for call in calls) == 30 * 2
    plain = build(name).model.layers[0].mlp.experts
    assert (experts.gate_up_proj.shape, experts.down_proj.shape) == (plain.gate_up_proj.shape, plain.down_proj.shape)
    sparsify.save(fast, tmp_path / "model.safetensors")
    loaded = sparsify.load(tmp_path / "model.safetensors", build(name))
    torch.testing.assert_close(loaded(IDS).logits, fast(IDS).logits)
    back = sparsify.to_dense(loaded)
    assert back.state_dict().keys() == build(name).state_dict().keys()
    torch.testing.assert_close(back(IDS).logits, expected)


def test_experts_are_measured_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparsify.prune(sparsify.convert(build("Mixtral"), functional=True), 0.9)
    times = {"dense": 9.0, "gather": 1.0, "panel": 2.0, "bitmask": 2.0}

    def measured(self: FormSelector, candidates: Any, x: Tensor) -> tuple[dict[str, float], float]:
        return {form: time for form, time in times.items() if form in candidates}, 0.0

    monkeypatch.setattr(FormSelector, "_measure_quietly", measured)
    for packed, form in ((5.0, "gather"), (20.0, "dense")):
        monkeypatch.setattr(FormSelector, "times", lambda self, calls, us=packed: _ran(calls, us))
        fast = sparsify.export(model, example={"input_ids": IDS})
        rows = [row for row in sparsify.report(fast) if "experts" in row.name]
        assert [row.format for row in rows] == [form] * 4
        torch.testing.assert_close(fast(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def _ran(calls: Any, packed_us: float) -> dict[str, float]:
    torch.testing.assert_close(*[call() for call in calls.values()], rtol=1e-4, atol=1e-5)
    return {"dense": 10.0, "packed": packed_us}


def test_weights_of_experts_are_refused_in_writes_and_dense_elsewhere() -> None:
    model = sparsify.prune(sparsify.convert(build("Mixtral"), functional=True), 0.5)
    experts = sparsify.export(model, format="csr").model.layers[0].mlp.experts
    weight, plain = experts.down_proj, model.model.layers[0].mlp.experts.down_proj.detach()
    assert torch.equal(weight + 0, plain)
    assert torch.equal(weight[1:3], plain[1:3])
    assert torch.equal(weight[-1] + 0, plain[-1])
    assert len(weight) == 4
    with pytest.raises(RuntimeError, match="packed and cannot be changed in place"):
        weight.mul_(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (weight.dtype, weight.device, weight.ndim) == (torch.float32, plain.device, 3)

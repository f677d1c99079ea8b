"""A masked weight is zero after every way in which a mask, a weight or a layer can change."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify import Pruner, Recipe, SparseLinear, convert, export, masks_from_zeros, prune, to_dense


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


X = torch.linspace(-1, 1, 24).reshape(3, 8)


def assert_zero(model: nn.Module, sparsity: float | None = None) -> None:
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            assert not layer.weight[~layer.mask].any()
            assert sparsity is None or layer.sparsity == pytest.approx(sparsity, abs=0.01)


def written(model: nn.Module) -> nn.Module:
    """Write values to all weights, the masked too, as merged adapters or a momentum do."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SparseLinear):
                layer.weight.add_(1.0)
    return model


@pytest.mark.parametrize("assign", [False, True])
def test_a_mask_loaded_alone_zeroes_what_it_removes(assign: bool) -> None:
    sparse, model = prune(convert(mlp()), 0.5), written(convert(mlp()))
    masks = {key: value for key, value in sparse.state_dict().items() if value.dtype == torch.bool}
    model.load_state_dict(masks, strict=False, assign=assign)
    assert_zero(model, 0.5)
    more = {key: torch.ones_like(mask) for key, mask in masks.items()}
    written(model).load_state_dict(more, strict=False, assign=assign)  # gives back at zero
    assert int((model[0].weight == 0).sum()) == 48


def test_a_lower_target_gives_weights_back_at_zero_whatever_was_written_meanwhile() -> None:
    model = written(prune(convert(mlp()), 0.75))
    kept = model[0].mask.clone()
    values = model[0].weight.detach().clone()
    prune(model, 0.25)
    assert_zero(model, 0.25)
    back = model[0].mask & ~kept
    assert back.sum() == 48
    assert not model[0].weight[back].any()
    assert torch.equal(model[0].weight[kept], values[kept])


def test_a_mask_written_in_place_counts_at_once_and_zeroes_with_the_next_change() -> None:
    model = prune(convert(mlp()), 0.5)
    model[0].mask[3] = False
    assert model(X).shape == (3, 4)
    assert not model[0].masked_weight()[3].any()
    for one in (export(model, format="csr"), export(model, format="dense"), copy.deepcopy(model)):
        assert not to_dense(one)[0].weight[3].any()
    prune(model, 0.5)
    assert_zero(model, 0.5)


@pytest.mark.parametrize(
    "change", [nn.Module.half, lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.float64), copy.deepcopy]
)
def test_another_dtype_keeps_mask_and_zeros(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(prune(convert(mlp()), 0.5))
    assert model[0].mask.dtype == torch.bool
    assert_zero(model, 0.5)


def test_zeros_are_taken_as_masks_without_giving_masked_weights_back() -> None:
    model = prune(convert(mlp()), 0.5)
    masks = model[0].mask.clone()
    masks_from_zeros(written(model))
    assert torch.equal(model[0].mask, masks)
    assert_zero(model, 0.5)


@pytest.mark.parametrize("masked", ["frozen", "trained"])
def test_leaving_in_the_middle_of_a_schedule(masked: str) -> None:
    model = convert(mlp())
    schedule = {"kind": "linear", "end": 10, "every": 1}
    group = {"sparsity": 0.8, "masked": masked, "schedule": schedule}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Pruner(model, Recipe(groups=[group]), optimizer=optimizer)
    for _ in range(5):
        model(X).square().sum().backward()
        optimizer.step()
        pruner.step()
    hidden = model[0].weight.detach().clone()
    assert hidden[~model[0].mask].any()  # they are only out of sight
    expected = model(X)

    for format in ("dense", "csr"):
        fast = export(model, format=format)
        torch.testing.assert_close(fast(X), expected)
        assert torch.equal(model[0].weight, hidden)  # the export is a copy
        dense = to_dense(fast)
        assert int((dense[0].weight == 0).sum()) == int((~model[0].mask).sum())
        assert_zero(prune(convert(dense), 0.5), 0.5)  # no schedule goes on in it

    to_dense(model)
    assert torch.equal(model(X), expected)
    assert int((model[0].weight == 0).sum()) > 30
    assert not {"masked_mode", "accumulator", "training_kernels"} & set(model[0].__dict__)
    assert_zero(prune(convert(model), 0.9), 0.9)


def test_a_transposed_parameter_comes_back_with_zeros() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.up

    model = prune(convert(Product(), functional=True), 0.5)
    with torch.no_grad():
        model.up_layer.weight.add_(1.0)
    assert int((to_dense(model).up == 0).sum()) == 16


def test_a_refused_merge_of_adapters_changes_nothing() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    prune(convert(wrapped), 0.5)
    base = wrapped.base_model.model[0].base_layer
    before = base.weight.detach().clone()
    with pytest.raises(ValueError, match="merging would lose that part"):
        wrapped.merge_adapter()
    assert torch.equal(base.weight, before)
    assert_zero(wrapped)
    x = torch.randn(3, before.shape[1])
    with torch.no_grad():
        expected = wrapped(x)
        merged = to_dense(wrapped).merge_and_unload()  # the way out of the message
        torch.testing.assert_close(merged(x), expected)
    assert_zero(prune(convert(merged), 0.5))


def trains(model: nn.Module) -> bool:
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().sum().backward()
    optimizer.step()
    return not torch.equal(model[0].weight, before)


def test_what_is_made_inside_inference_mode_trains_outside(tmp_path: Path) -> None:
    model, fresh, path = mlp(), mlp(), tmp_path / "model.safetensors"
    with torch.inference_mode():
        prune(convert(model), 0.5)
        prune(model, 0.25)
        sparsify.save(model, path)
        loaded = sparsify.load(path, fresh)
        back = to_dense(export(model, format="csr"))
    for one in (model, loaded, back):
        assert trains(one)
    assert_zero(model, 0.25)


def test_a_model_made_inside_inference_mode_is_pruned_and_exported_outside() -> None:
    with torch.inference_mode():
        model = mlp()
    prune(convert(model), 0.5)
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(export(model, format="csr")(X), expected)
        assert int((to_dense(model)[0].weight == 0).sum()) == 48
        assert torch.equal(model(X), expected)

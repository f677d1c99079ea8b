"""SparseLinear computes with weight * mask, trains the kept weights, and prunes further by sparse_update."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, SHAPES, masks, repeatable, weight
from hypothesis import given
from hypothesis import strategies as st
from masked_linears import inputs, layer_with
from torch import Tensor, nn

from sparsify import SparseLinear

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_is_that_of_a_dense_layer_with_zeros(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for name, mask in masks(shape).items():
        layer = layer_with(mask, dtype)
        expected = F.linear(inputs(layer), weight(shape, dtype) * mask, layer.bias)
        assert torch.equal(layer(inputs(layer)), expected), name
        assert layer.weight.dtype == dtype
        assert layer.sparsity == int((~mask).sum()) / mask.numel()


def test_construction_prunes_at_random_and_keeps_linears_arguments() -> None:
    layer = SparseLinear(20, 10, 0.9, bias=False, seed=1, dtype=torch.float64)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.bias, layer.weight.dtype) == (20, 10, None, torch.float64)
    assert int(layer.mask.sum()) == 20
    assert layer.sparsity == 0.9
    assert torch.equal(layer.mask, SparseLinear(20, 10, 0.9, seed=1).mask)
    assert not torch.equal(layer.mask, SparseLinear(20, 10, 0.9, seed=2).mask)
    assert layer.weight[~layer.mask].eq(0).all()
    assert layer.weight[layer.mask].ne(0).all()


def test_construction_by_another_method_and_pattern() -> None:
    layer = SparseLinear(8, 4, 0.5, method="magnitude", pattern="2:4")
    assert layer.mask.reshape(-1, 4).sum(1).eq(2).all()


@pytest.mark.parametrize(("sparsity", "n_kept"), [(0, 32), (0.0, 32), (1, 0), (0.1, 29)])
def test_construction_at_the_ends(sparsity: float, n_kept: int) -> None:
    layer = SparseLinear(8, 4, sparsity)
    assert int(layer.mask.sum()) == n_kept
    assert layer.sparsity == (32 - n_kept) / 32


@pytest.mark.parametrize(
    ("sparsity", "options", "message"),
    [
        (1.5, {}, "must be a fraction between 0 and 1, got 1.5"),
        (float("nan"), {}, "must be a fraction"),
        (0.5, {"method": "magnitud"}, "'magnitud' is none of"),
        (0.0, {"method": "magnitud"}, "'magnitud' is none of"),
        (0.0, {"pattern": "diagonal"}, "'diagonal' is none of"),
        (0.0, {"pattern": "1:2"}, "pattern 1:2 means sparsity 0.5, got 0"),
        (0.5, {"pattern": "2:4"}, "needs in_features divisible by 4, got 10"),
        (0.5, {"method": "magnitude", "seed": 1}, "seed=1 has no effect with method 'magnitude'"),
        (0.0, {"method": "magnitude", "seed": 1}, "seed=1 has no effect with method 'magnitude'"),
    ],
)
def test_construction_refuses_what_it_cannot_do(sparsity: float, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinear(10, 4, sparsity, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_reach_the_kept_weights_only(dtype: torch.dtype) -> None:
    mask = masks((12, 8))["half"]
    layer = layer_with(mask, dtype)
    x = inputs(layer).requires_grad_()
    layer(x).sum().backward()
    grad = layer.weight.grad
    assert grad is not None
    assert grad.dtype == dtype
    assert grad[~mask].eq(0).all()
    dense = x.detach().sum(0).expand(12, 8)  # d(sum of outputs) / d(weight) of a dense layer
    torch.testing.assert_close(grad[mask], dense[mask])
    assert grad[mask].ne(0).all()
    torch.testing.assert_close(x.grad, (weight((12, 8), dtype) * mask).sum(0).expand(3, 8))


def test_gradients_are_right_by_finite_differences() -> None:
    mask = masks((5, 3))["half"]
    layer = layer_with(mask, torch.float64)

    def output(w: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    w = layer.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(output, (w, inputs(layer).requires_grad_()))


def test_a_masked_weight_that_is_not_a_number_does_no_harm() -> None:
    layer = layer_with(torch.tensor([[True, False]]))
    with torch.no_grad():
        layer.weight[0, 1] = float("nan")
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1.0, 0.0]]
    assert torch.isfinite(layer(torch.ones(1, 2))).all()


def test_a_frozen_weight_stays_frozen() -> None:
    layer = layer_with(masks((4, 4))["half"]).requires_grad_(False)
    assert not layer(torch.ones(1, 4)).requires_grad
    layer.sparse_update(0.75)
    assert not layer.weight.requires_grad
    assert layer.sparsity == 0.75


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_it_learns_and_an_optimizer_cannot_revive_what_is_masked(make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    layer = SparseLinear(8, 4, 0.25, seed=0)
    optimizer = make(layer.parameters())
    losses = []
    for step in range(30):
        if step == 10:
            layer.sparse_update(0.75)  # momentum for what is masked now is in the optimizer
        loss = F.mse_loss(layer(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected = F.linear(x, layer.weight.detach() * layer.mask, layer.bias)
        torch.testing.assert_close(layer(x), expected)
    assert losses[9] < losses[0]
    assert losses[29] < losses[10]
    assert layer.sparsity == 0.75
    layer.zero_masked()
    assert int((layer.weight == 0).sum()) == 24


@repeatable
@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.sampled_from(["unstructured", "rows", "4x1"]))
def test_sparse_update_nests_and_counts(targets: list[float], pattern: str) -> None:
    layer = layer_with(masks((12, 8))["all"])
    for before, target in zip([0.0, *sorted(targets)], sorted(targets), strict=False):
        old = layer.mask.clone()
        layer.sparse_update(target, pattern=pattern)
        assert not bool((layer.mask & ~old).any()), (before, target)
        n_units = {"unstructured": 96, "rows": 12, "4x1": 24}[pattern]
        assert int((~layer.mask).sum()) * n_units == round(target * n_units) * 96
        assert layer.weight[~layer.mask].eq(0).all()


def test_sparse_update_removes_the_smallest_now() -> None:
    layer = layer_with(torch.ones(1, 4, dtype=torch.bool))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 3.0, -4.0]]))
    layer.sparse_update(0.25)
    assert layer.weight.tolist() == [[0.0, -2.0, 3.0, -4.0]]
    with torch.no_grad():
        layer.weight[0, 3] = 0.5  # trained since
    layer.sparse_update(0.5)
    assert layer.weight.tolist() == [[0.0, -2.0, 3.0, 0.0]]
    layer.sparse_update(0.25)
    assert layer.sparsity == 0.25
    assert layer.mask[0, 1:3].all()  # the pattern that was trained is not lost
    assert layer.weight.tolist() == [[0.0, -2.0, 3.0, 0.0]]


def test_sparse_update_between_forward_and_backward() -> None:
    layer = layer_with(masks((4, 4))["all"])
    loss = layer(torch.ones(1, 4)).sum()
    layer.sparse_update(0.5)
    loss.backward()
    assert layer.weight.grad is not None


def test_an_update_that_fails_changes_nothing() -> None:
    layer = layer_with(masks((4, 6))["half"])
    mask, w = layer.mask.clone(), layer.weight.detach().clone()
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        layer.sparse_update(pattern="2:4")
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer.sparse_update(-1)
    with pytest.raises(ValueError, match=r"a mask must be bool of shape \(4, 6\), got torch.float32 \(4, 6\)"):
        layer.set_mask(mask.float())
    with pytest.raises(ValueError, match=r"got torch.bool \(6, 4\)"):
        layer.set_mask(mask.T)
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, w)


def test_the_layer_does_not_follow_the_mask_it_was_given() -> None:
    mask = masks((4, 4))["all"]
    layer = layer_with(mask)
    mask[:] = False
    assert layer.mask.all()


def test_autocast_computes_in_the_lower_precision() -> None:
    layer = layer_with(masks((12, 8))["half"])
    x = inputs(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = F.linear(x, layer.weight.detach() * layer.mask, layer.bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad[~layer.mask].eq(0).all()


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 3, 8), (2, 1, 3, 8)])
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    layer = layer_with(masks((12, 8))["half"])
    x = weight((1, 48)).reshape(-1)[: torch.Size(shape).numel()].reshape(shape)
    assert torch.equal(layer(x), F.linear(x, layer.weight * layer.mask, layer.bias))


def test_compile_in_one_graph_in_eval_and_in_training() -> None:
    layer = layer_with(masks((12, 8))["half"])
    x = inputs(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for sparsity in (0.5, 0.75):
        layer.sparse_update(sparsity)  # the compiled layer sees the new mask
        optimizer.zero_grad()
        y = compiled(x)
        torch.testing.assert_close(y, F.linear(x, layer.weight.detach() * layer.mask, layer.bias))
        y.sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad[~layer.mask].eq(0).all()
        assert layer.weight.grad[layer.mask].ne(0).all()
        optimizer.step()
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight.detach() * layer.mask, layer.bias))


def test_a_new_mask_does_not_compile_again() -> None:
    n_compiled = 0

    def backend(graph, example_inputs):  # type: ignore[no-untyped-def]
        nonlocal n_compiled
        n_compiled += 1
        return graph.forward

    layer = layer_with(masks((12, 8))["all"])
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for sparsity in (0.0, 0.25, 0.5, 0.75):
        layer.sparse_update(sparsity)
        compiled(inputs(layer))
    assert n_compiled == 1


def test_layers_of_one_shape_get_their_own_masks_and_a_seed_fixes_them() -> None:
    torch.manual_seed(0)
    one, other = SparseLinear(16, 16, 0.5), SparseLinear(16, 16, 0.5)
    assert not torch.equal(one.mask, other.mask)
    torch.manual_seed(0)
    assert torch.equal(SparseLinear(16, 16, 0.5).mask, one.mask)
    assert torch.equal(SparseLinear(16, 16, 0.5, seed=3).mask, SparseLinear(16, 16, 0.5, seed=3).mask)

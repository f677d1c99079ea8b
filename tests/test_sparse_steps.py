"""A training step that touches kept weights only gives what the dense one gives, up to the order of additions."""

import pytest
import torch
import torch.nn.functional as F
from cases import SHAPES, masks, weight
from torch import nn

import sparsify
from sparsify.kernels import native, training
from sparsify.kernels.training import StepIndex
from sparsify.layers import sparse_steps

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.why_missing()}"),
]
EPS = 2.0**-24


@pytest.mark.parametrize("n_rows", [1, 2, 17, 300])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["all", "none", "empty row", "empty column", "half"])
def test_a_step_is_that_of_the_masked_weight(kernel, shape, name, n_rows):
    """Any order of n products in float32 is off by at most (n + 1) eps times the sum of their sizes."""
    mask = masks(shape)[name]
    x, w, bias, grad = weight((n_rows, shape[1]), seed=1), weight(shape), weight((1, shape[0]), seed=2)[0], None
    grad = weight((n_rows, shape[0]), seed=3)
    leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
    y = training.linear(leaves[0].view(1, n_rows, -1), leaves[1], leaves[2], StepIndex.of(mask))
    got = (y[0], *torch.autograd.grad(y, leaves, grad[None]))
    x, w, bias, grad = (t.double() for t in (x, w * mask, bias, grad))
    exact = (x @ w.T + bias, grad @ w, (grad.T @ x) * mask, grad.sum(0))
    x, w, bias, grad = (t.abs() for t in (x, w, bias, grad))
    sizes = (x @ w.T + bias, grad @ w, grad.T @ x, grad.sum(0))
    for value, right, size, n in zip(got, exact, sizes, (shape[1] + 1, shape[0], n_rows, n_rows), strict=True):
        assert value.shape == right.shape
        assert ((value.double() - right).abs() <= (n + 1) * EPS * size + 1e-30).all()
    assert torch.count_nonzero(got[2][~mask]) == 0


def net(sparsity=0.9):
    torch.manual_seed(0)
    model = sparsify.convert(nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 8)))
    return sparsify.prune(model, sparsity)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(32, 48, generator=generator), torch.randint(8, (32,), generator=generator)


def losses(sparse_backward, *, each=lambda model: None, n_steps=25):
    model = net(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recipe = sparsify.Recipe(
        groups=[
            {"sparsity": 0.9, "regrow": {"by": "gradient"}, "schedule": {"kind": "constant", "end": 15, "every": 5}}
        ]
    )
    pruner = sparsify.Pruner(model, recipe, optimizer=optimizer, sparse_backward=sparse_backward)
    seen = []
    for step in range(n_steps):
        optimizer.zero_grad()
        for part in range(2):  # gradients accumulate
            x, y = batch(2 * step + part)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        each(model)
        optimizer.step()
        pruner.step()
        seen.append(loss.item())
    return seen, model


def test_losses_masks_and_weights_of_a_training_are_the_same():
    """25 steps of a small net, whose errors of some eps grow by less than a factor of 2 a step where it is smooth."""
    (dense, a), (sparse, b) = losses("never"), losses("always")
    assert b[0].steps is not None
    assert b[0].steps.index is not None  # it was used
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    for one, other in ((a[0], b[0]), (a[2], b[2])):
        assert torch.equal(one.mask, other.mask)
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-4)
        assert torch.count_nonzero(other.weight[~other.mask]) == 0


def test_the_memory_of_gradients_is_used_again_only_when_nobody_has_it():
    layer = net()[0]
    layer.steps = sparse_steps.SparseSteps(always=True)
    x = torch.randn(4, 48)

    def gradient():
        layer.weight.grad = None
        layer(x).sum().backward()
        return layer.weight.grad

    first = gradient()
    address, copy = first.data_ptr(), first.clone()
    second = gradient()  # `first` is still held
    assert second.data_ptr() != address
    assert torch.equal(first, copy)
    del first
    address = second.data_ptr()
    second.add_(1.0)  # noise in places that nothing writes to
    del second
    third = gradient()
    assert third.data_ptr() == address
    assert torch.equal(third, copy)
    layer(x).sum().backward()  # accumulates
    torch.testing.assert_close(layer.weight.grad, 2 * copy)
    del third
    layer.weight.grad = None
    (layer(x).sum() + layer(2 * x).sum()).backward()  # used twice in one pass
    torch.testing.assert_close(layer.weight.grad, 3 * copy)


def test_the_faster_way_is_taken_and_measured_once_for_each_mask(monkeypatch):
    measured = []
    monkeypatch.setattr(
        sparse_steps, "_is_faster", lambda *args: measured.append(args[1].shape[0]) or len(measured) != 2
    )
    layer = net()[0]
    layer.steps = sparse_steps.SparseSteps(always=False)
    used = []
    monkeypatch.setattr(
        "sparsify.layers.sparse_linear.training.linear",
        lambda *args: used.append(1) or training._SparseStep.apply(*args),
    )
    for n_rows in (4, 4, 8, 8, 4):
        layer(torch.randn(n_rows, 48))
    assert measured == [4, 8]
    assert len(used) == 3
    layer.sparse_update(0.95)
    layer(torch.randn(4, 48))
    assert measured == [4, 8, 4]
    layer.sparse_update(0.5)
    layer(torch.randn(4, 48))
    assert measured == [4, 8, 4]  # too dense to be worth a try


@pytest.mark.parametrize("why", ["no grad", "autocast", "float64", "straight-through", "watched", "frozen"])
def test_the_dense_way_is_taken_where_the_kernels_do_not_fit(why, monkeypatch):
    layer, x = net()[0], torch.randn(4, 48)
    layer.steps = sparse_steps.SparseSteps(always=True)
    monkeypatch.setattr("sparsify.layers.sparse_linear.training.linear", lambda *args: pytest.fail("not here"))
    if why == "no grad":
        torch.no_grad()(layer)(x)
    elif why == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
    elif why == "float64":
        layer.double()(x.double())
    elif why == "straight-through":
        layer.masked_are = "trained"
        layer(x)
    elif why == "watched":
        sparsify.evidence.watch(layer, gradient=True, movement=False)
        layer(x).sum().backward()
    else:
        layer.weight.requires_grad_(False)
        layer(x)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="sparse_backward 'yes' is none of: never, auto, always"):
        sparsify.Pruner(net(), sparsify.Recipe(groups=[{"sparsity": 0.9}]), sparse_backward="yes")

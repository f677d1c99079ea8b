"""A training step that touches kept weights only gives what the dense one gives, up to the order of additions."""

import pytest
import torch
import torch.nn.functional as F
from cases import SHAPES, masks, weight
from tested_kernels import needs_native
from torch import nn
from torch.autograd import forward_ad

import sparsify
from sparsify.kernels.cpu import sparse_step as training
from sparsify.kernels.cpu.sparse_step import StepIndex
from sparsify.layers import sparse_training as sparse_steps

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    needs_native,
]
FORM = "panel"  # an instruction set with panel kernels of its own has training kernels of its own
EPS = 2.0**-24
JIT_WARNS = pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own forward-mode derivatives use it


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
    assert b[0].training_kernels is not None
    assert b[0].training_kernels.index is not None  # it was used
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    for one, other in ((a[0], b[0]), (a[2], b[2])):
        assert torch.equal(one.mask, other.mask)
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-4)
        assert torch.count_nonzero(other.weight[~other.mask]) == 0


def test_the_memory_of_gradients_is_used_again_only_when_nobody_has_it():
    layer = net()[0]
    layer.training_kernels = sparse_steps.SparseTrainingKernels(always=True)
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
    layer.training_kernels = sparse_steps.SparseTrainingKernels(always=False)
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


def always(model):
    """Let every layer take the sparse way."""
    for layer in (model[0], model[2]):
        layer.training_kernels = sparse_steps.SparseTrainingKernels(always=True)
    return model


def penalty(model):
    """Return the gradients of a loss with a gradient penalty, by the input and by every parameter."""
    x = batch(0)[0].requires_grad_()
    loss = model(x).square().sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def third_derivative(model):
    """Differentiate three times by all parameters."""
    parameters, value = list(model.parameters()), model(batch(0)[0]).square().sum()
    for _ in range(2):
        found = torch.autograd.grad(value, parameters, create_graph=True)
        value = sum(one.square().sum() for one in found)
    return torch.autograd.grad(value, parameters)


@pytest.mark.parametrize("derivative", [penalty, third_derivative])
def test_derivatives_of_derivatives_are_those_of_the_dense_way(derivative):
    for got, right in zip(derivative(always(net())), derivative(net()), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def test_a_weight_changed_before_a_backward_counts_as_it_was_in_the_forward():
    model, x = always(net()), batch(0)[0].requires_grad_()
    right = torch.autograd.grad(model(x).sum(), x)[0]
    loss = model(x).sum()
    with torch.no_grad():
        model[2].weight.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], right, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="a weight has changed between the forward and a backward"):
        torch.autograd.grad(loss, x, create_graph=True)


@JIT_WARNS
@pytest.mark.parametrize("masked", ["zero", "trained"])
def test_forward_derivatives_and_function_transforms(masked):
    """Under torch.func, and for dual numbers, a layer that trains is the dense layer with the same zeros."""
    model = always(net())
    dense = sparsify.to_dense(net())
    x, v = torch.randn(2, 5, 48)
    taught = {f"{i}.weight": model[i].mask for i in (0, 2)} if masked == "zero" else {}
    directions = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    directions = {name: value * taught.get(name, 1) for name, value in directions.items()}

    def found(net):
        parameters = dict(net.named_parameters())

        def call(values, x):
            return torch.func.functional_call(net, values, (x,))

        def loss(values, x):
            return call(values, x).square().sum()

        with forward_ad.dual_level():
            outputs = [net(forward_ad.make_dual(x, v))]
            duals = {name: forward_ad.make_dual(p.detach(), directions[name]) for name, p in parameters.items()}
            outputs.append(call(duals, x))
            tangents = [forward_ad.unpack_dual(output).tangent for output in outputs]
        yield from tangents
        yield torch.func.jvp(net, (x,), (v,))[1]
        yield torch.func.jvp(lambda values: call(values, x), (parameters,), (directions,))[1]
        yield from (torch.func.jacfwd(net)(x[0]), torch.func.jacrev(net)(x[0]), torch.func.vmap(net)(x))
        by_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        yield from (value * taught.get(name, 1) for name, value in sorted(by_sample.items()))

    for layer in (model[0], model[2]):
        layer.masked_mode = masked
    for got, right in zip(found(model), found(dense), strict=True):
        assert torch.count_nonzero(right)
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@JIT_WARNS
def test_a_tracer_sees_the_dense_way():
    model, (x, _) = always(net()), batch(0)
    for traced in (torch.fx.symbolic_trace(model), torch.jit.trace(model, x)):
        torch.testing.assert_close(traced(x), net()(x), rtol=1e-5, atol=1e-6)


def test_gradients_of_torch_func_are_refused_to_a_pruner_that_looks_at_them():
    model, (x, _) = net(), batch(0)
    sparsify.training.gradient_statistics.accumulate_gradients(model[0], gradient=False, movement=True)
    parameters = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match=r"those of loss.backward\(\), not those of torch.func"):
        torch.func.grad(lambda values: torch.func.functional_call(model, values, (x,)).sum())(parameters)


#: Obstacles to the kernels for kept weights, and whether a step goes through the kernels.
WAYS = {
    "none": True,
    **dict.fromkeys(("no grad", "autocast", "float64", "straight-through", "watched", "frozen"), False),
}


@pytest.mark.parametrize(("obstacle", "is_sparse"), WAYS.items())
def test_the_dense_way_is_taken_where_the_kernels_do_not_fit(obstacle, is_sparse, monkeypatch):
    layer, x, calls = net()[0], torch.randn(4, 48), []
    layer.training_kernels = sparse_steps.SparseTrainingKernels(always=True)
    monkeypatch.setattr(
        "sparsify.layers.sparse_linear.training.linear",
        lambda *args: calls.append(1) or training._SparseStep.apply(*args),
    )
    if obstacle == "float64":
        layer, x = layer.double(), x.double()
    elif obstacle == "straight-through":
        layer.masked_mode = "trained"
    elif obstacle == "watched":
        sparsify.training.gradient_statistics.accumulate_gradients(layer, gradient=True, movement=False)
    elif obstacle == "frozen":
        layer.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=obstacle == "autocast"):
        y = layer(x) if obstacle != "no grad" else torch.no_grad()(layer)(x)
        dense = F.linear(x, layer.weight.detach() * layer.mask, layer.bias)
    assert len(calls) == is_sparse
    tolerance = None if is_sparse else 0.0
    torch.testing.assert_close(y, dense, rtol=tolerance, atol=tolerance)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="sparse_backward 'yes' is none of: never, auto, always"):
        sparsify.Pruner(net(), sparsify.Recipe(groups=[{"sparsity": 0.9}]), sparse_backward="yes")

"""Movement, SNIP and GraSP: scores from gradients, against the formulas of their papers."""

import pytest
import torch
import torch.nn.functional as F
from method_steps import LR, batch, largest, layers, net, recipe, train, used_gradients

import sparsify

pytestmark = pytest.mark.usefixtures("one_thread")


def test_movement_adds_up_weight_times_gradient_of_masked_weights_too():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    schedule = {"kind": "linear", "start": 2, "end": 8, "every": 2}
    pruner = sparsify.Pruner(
        model, recipe(sparsity=0.8, method="movement", masked="frozen", schedule=schedule), optimizer=optimizer
    )
    moved = [torch.zeros_like(layer.weight) for layer in layers(model)]
    came_back, hidden = 0, None
    for step in range(8):
        x, y = batch(step)
        for total, layer, gradient in zip(moved, layers(model), used_gradients(model, x, y), strict=True):
            total -= layer.weight.detach() * gradient
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        before = [(layer.mask.clone(), layer.weight.detach().clone()) for layer in layers(model)]
        pruner.step()
        if (step + 1) % 2 == 0:
            target = 0.8 * (step + 1 - 2) / 6
            for layer, total, (mask, values) in zip(layers(model), moved, before, strict=True):
                n_keep = mask.numel() - round(target * mask.numel())
                assert torch.equal(layer.mask, largest([total], n_keep)[0])
                back = layer.mask & ~mask
                came_back += int(back.sum())
                assert torch.equal(layer.weight[back], values[back])
        if step == 5:
            hidden = model[0].weight[~model[0].mask]
    assert torch.count_nonzero(hidden)  # masked weights had values until the schedule ended
    assert came_back
    assert all(torch.count_nonzero(layer.weight[~layer.mask]) == 0 for layer in layers(model))
    assert all(layer.accumulator is None for layer in layers(model))


def test_movement_does_not_depend_on_the_scale_of_the_loss():
    def masks_with(scaler):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        schedule = {"kind": "linear", "end": 6, "every": 2}
        pruner = sparsify.Pruner(
            model,
            recipe(sparsity=0.5, method="movement", masked="frozen", schedule=schedule),
            optimizer=optimizer,
            scaler=scaler,
        )
        for step in range(6):
            x, y = batch(step)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            pruner.step()
        return [layer.mask for layer in layers(model)], pruner

    growing, _ = masks_with(torch.amp.GradScaler("cpu", init_scale=2.0, growth_factor=64.0, growth_interval=1))
    still, _ = masks_with(torch.amp.GradScaler("cpu", enabled=False))
    for a, b in zip(growing, still, strict=True):
        assert torch.equal(a, b)


def test_snip_ranks_all_layers_by_weight_times_gradient():
    model, (x, y) = net(), batch(0, 64)
    expected = largest(
        [
            (layer.weight.detach() * g).abs()
            for layer, g in zip(layers(model), used_gradients(model, x, y), strict=True)
        ],
        256 - round(0.7 * 256),
    )
    pruner = sparsify.Pruner(
        model, sparsify.load_recipe("recipes/snip.yaml", sparsity=0.7), loss=lambda: F.cross_entropy(model(x), y)
    )
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(model), expected, strict=True))
    assert pruner.sparsity == pytest.approx(0.7, abs=0.002)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_snip_from_the_first_step_of_a_loop_with_weights_set_back():
    """No loss is given: the mask comes from the first step's own gradient, and the step is undone."""
    model, (x, y) = net(), batch(0)
    start = [layer.weight.detach().clone() for layer in layers(model)]
    expected = largest(
        [(w * g).abs() for w, g in zip(start, used_gradients(model, x, y), strict=True)], 256 - round(0.7 * 256)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    group = recipe(
        sparsity=0.7, method="snip", allocation="global", rewind=0, schedule={"kind": "one-shot", "start": 1}
    )
    pruner = sparsify.Pruner(model, group, optimizer=optimizer)
    train(model, pruner, optimizer, 1)
    for layer, mask, old in zip(layers(model), expected, start, strict=True):
        assert torch.equal(layer.mask, mask)
        assert torch.equal(layer.weight, old * mask)
    assert not optimizer.state


def test_grasp_is_weight_times_hessian_times_gradient():
    model, (x, y) = net(), batch(0, 64)
    model.double()
    x = x.double()
    flat = torch.cat([layer.weight.detach().flatten() for layer in layers(model)])

    def loss_of(vector):
        first, second = vector[:192].view(16, 12), vector[192:].view(4, 16)
        return F.cross_entropy(F.linear(torch.tanh(F.linear(x, first, model[0].bias)), second, model[2].bias), y)

    gradient = torch.autograd.functional.jacobian(loss_of, flat)
    scores = flat * (torch.autograd.functional.hessian(loss_of, flat) @ gradient)
    expected = largest([scores[:192].view(16, 12), scores[192:].view(4, 16)], 256 - round(0.7 * 256))
    sparsify.Pruner(
        model, sparsify.load_recipe("recipes/grasp.yaml", sparsity=0.7), loss=lambda: F.cross_entropy(model(x), y)
    )
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(model), expected, strict=True))


@pytest.mark.parametrize(("method", "words"), [("snip", "the sum over all steps"), ("grasp", "the Hessian")])
def test_what_a_method_lacks_is_said_before_anything_changes(method, words):
    model = net()
    group = recipe(sparsity=0.5, method=method)
    with pytest.raises(ValueError, match=rf"0: method '{method}' needs {words}.*argument 'loss'"):
        sparsify.Pruner(model, group)
    with pytest.raises(ValueError, match=r"sparsify\.Pruner"):
        sparsify.prune(model, 0.5, method=method)
    with pytest.raises(ValueError, match=r"sparsify\.Pruner"):
        sparsify.apply(model, group)
    with pytest.raises(ValueError, match="2: the loss given does not depend on its weight"):
        sparsify.Pruner(model, group, loss=lambda: model[0].weight.sum())
    assert all(layer.mask.all() for layer in layers(model))

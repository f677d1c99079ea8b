"""Each method that trains, against the formula of its paper written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import masks, weight
from torch import nn

import sparsify
from sparsify.layers import MaskedLayer
from sparsify.layers.masked_weight import masked_weight
from sparsify.masking.patterns import parse_pattern
from sparsify.masking.regrowth import drop_and_grow

pytestmark = pytest.mark.usefixtures("one_thread")

LR = 0.1


def net(seed=0):
    torch.manual_seed(seed)
    return sparsify.convert(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)))


def batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 12, generator=generator), torch.randint(4, (size,), generator=generator)


def layers(model):
    return [module for module in model.modules() if isinstance(module, MaskedLayer)]


def recipe(**group):
    return sparsify.Recipe(groups=[group])


def constant(end, every=1):
    return {"kind": "constant", "end": end, "every": every}


def train(model, pruner, optimizer, n_steps, first=0, look=lambda step: None):
    for step in range(first, first + n_steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        look(step)
        optimizer.step()
        pruner.step()


def used_gradients(model, x, y):
    """Return the gradients of the weights as they are used, masked ones included, from a dense copy of the model."""
    used = [nn.Parameter(layer.masked_weight().detach()) for layer in layers(model)]
    hidden = torch.tanh(F.linear(x, used[0], model[0].bias))
    return torch.autograd.grad(F.cross_entropy(F.linear(hidden, used[1], model[2].bias), y), used)


def largest(scores, n_keep):
    """Keep the n_keep largest of one or more tensors together, by a sort."""
    flat = torch.cat([score.flatten() for score in scores])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:n_keep]] = True
    return [k.view_as(s) for k, s in zip(kept.split([s.numel() for s in scores]), scores, strict=True)]


# The mechanism


@pytest.mark.parametrize("name", ["all", "none", "empty row", "half"])
def test_straight_through_uses_kept_weights_and_teaches_all(name):
    w, mask = weight((5, 3)).requires_grad_(), masks((5, 3))[name]
    upstream = weight((5, 3), seed=1)
    for straight_through, taught in ((True, torch.ones_like(mask)), (False, mask)):
        w.grad = None
        used = masked_weight(w, mask, straight_through=straight_through, accumulator=None)
        assert torch.equal(used, torch.where(mask, w, torch.zeros(())))
        used.backward(upstream)
        assert torch.equal(w.grad, upstream * taught)


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "1x3", "4x1"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.999])
def test_an_exchange_drops_the_weakest_and_grows_the_strongest(pattern, fraction):
    parsed, shape = parse_pattern(pattern), (8, 6)
    rows, columns = parsed.unit_shape(shape)
    kept = torch.arange(parsed.n_units(shape)).reshape(8 // rows, 6 // columns) % 2 == 0
    mask = kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    scores, growth = weight(shape, seed=1).abs(), weight(shape, seed=2).abs()
    new = drop_and_grow(mask, scores, growth, fraction, parsed)

    def units(tensor):
        return tensor.reshape(8 // rows, rows, 6 // columns, columns).sum((1, 3)).flatten().tolist()

    n_moved = round(fraction * int(kept.sum()))
    strength = {i: s for i, (s, k) in enumerate(zip(units(scores.double()), kept.flatten().tolist(), strict=True)) if k}
    survivors = set(sorted(strength, key=strength.get, reverse=True)[: len(strength) - n_moved])
    grown = sorted(set(range(kept.numel())) - survivors, key=lambda i: -units(growth.double())[i])[:n_moved]
    assert {i for i, n in enumerate(units(new.int())) if n} == survivors | set(grown)
    assert int(new.sum()) == int(mask.sum())


# Dynamic sparse training


@pytest.mark.parametrize("n_looks", [1, 2, 4])
def test_rigl_grows_where_gradients_are_largest_and_looks_only_before_updates(n_looks):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    pruner = sparsify.Pruner(
        model,
        recipe(
            sparsity=0.8,
            allocation="erk",
            regrow={"by": "gradient", "fraction": 0.4, "steps": n_looks},
            schedule=constant(12, 4),
        ),
        optimizer=optimizer,
    )
    sums = [torch.zeros_like(layer.weight) for layer in layers(model)]
    n_kept = [int(layer.mask.sum()) for layer in layers(model)]
    assert sum(n_kept) == 256 - round(0.8 * 256)
    moved = 0
    for step in range(12):
        x, y = batch(step)
        looked = [layer.accumulator is not None for layer in layers(model)]
        assert looked == [step % 4 >= 4 - n_looks] * 2
        if looked[0]:
            sums = [a + b for a, b in zip(sums, used_gradients(model, x, y), strict=True)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert all(torch.count_nonzero(layer.weight.grad[~layer.mask]) == 0 for layer in layers(model))
        optimizer.step()
        old = [(layer.mask.clone(), layer.weight.detach().clone()) for layer in layers(model)]
        pruner.step()
        for layer, (mask, values), gradient in zip(layers(model), old, sums, strict=True):
            fraction = 0.4 / 2 * (1 + math.cos(math.pi * (step + 1) / 12)) if (step + 1) % 4 == 0 else 0.0
            n_moved = round(fraction * int(mask.sum()))
            survivors = largest([values.abs().masked_fill(~mask, -1)], int(mask.sum()) - n_moved)[0]
            grown = largest([gradient.abs().masked_fill(survivors, -1)], n_moved)[0]
            assert torch.equal(layer.mask, survivors | grown)
            assert torch.count_nonzero(layer.weight[grown & ~mask]) == 0
            moved += n_moved
        if (step + 1) % 4 == 0:
            sums = [torch.zeros_like(total) for total in sums]
    assert [int(layer.mask.sum()) for layer in layers(model)] == n_kept
    assert moved > 10


def test_set_grows_at_random_the_same_in_every_run():
    def trained(seed):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        pruner = sparsify.Pruner(
            model,
            recipe(sparsity=0.8, seed=seed, regrow={"by": "random"}, schedule=constant(9, 3)),
            optimizer=optimizer,
        )
        first = [layer.mask.clone() for layer in layers(model)]
        train(model, pruner, optimizer, 10)
        return first, [layer.mask for layer in layers(model)]

    (first, last), (_, again), (_, other) = trained(0), trained(0), trained(1)
    for a, b, c, d in zip(first, last, again, other, strict=True):
        assert torch.equal(b, c)
        assert not torch.equal(b, d)
        assert not torch.equal(a, b)
        assert int(a.sum()) == int(b.sum()) == a.numel() - round(0.8 * a.numel())


def test_gradual_pruning_with_regrowth_reaches_its_target():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    schedule = {"kind": "polynomial", "end": 10, "every": 2}
    pruner = sparsify.Pruner(
        model, recipe(sparsity=0.9, regrow={"by": "gradient"}, schedule=schedule), optimizer=optimizer
    )
    train(model, pruner, optimizer, 12)
    assert [int((~layer.mask).sum()) for layer in layers(model)] == [round(0.9 * 192), round(0.9 * 64)]


# Scores from gradients


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


# Masked weights that train, or wait


def test_straight_through_top_k_keeps_the_largest_at_each_step_and_zeroes_the_rest_at_its_end():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = sparsify.Pruner(model, recipe(sparsity=0.75, masked="trained", schedule=constant(10)), optimizer=optimizer)
    came_back = 0
    for step in range(14):
        x, y = batch(step)
        gradients = used_gradients(model, x, y)
        before = [(layer.weight.detach().clone(), layer.mask.clone()) for layer in layers(model)]
        train(model, pruner, optimizer, 1, first=step)
        for layer, (values, mask), gradient in zip(layers(model), before, gradients, strict=True):
            assert int((~layer.mask).sum()) == round(0.75 * mask.numel())
            came_back += int((layer.mask & ~mask).sum())
            if step < 9:
                torch.testing.assert_close(layer.weight.detach(), values - LR * gradient)
                assert torch.equal(layer.mask, largest([layer.weight.detach().abs()], int(mask.sum()))[0])
            else:
                assert torch.count_nonzero(layer.weight[~layer.mask]) == 0
    assert came_back > 5


def test_sr_ste_shrinks_what_is_not_used():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    group = recipe(pattern="2:4", masked="trained", decay=0.5, schedule=constant(6))
    pruner = sparsify.Pruner(model, group, optimizer=optimizer)
    for step in range(5):
        x, y = batch(step)
        gradients = used_gradients(model, x, y)
        before = [(layer.weight.detach().clone(), layer.mask.clone()) for layer in layers(model)]
        train(model, pruner, optimizer, 1, first=step)
        for layer, (values, _), gradient in zip(layers(model), before, gradients, strict=True):
            stepped = values - LR * gradient
            torch.testing.assert_close(
                layer.weight.detach(), torch.where(layer.mask, stepped, stepped * (1 - LR * 0.5))
            )
            assert (layer.mask.reshape(-1, 4).sum(1) == 2).all()
    with pytest.raises(ValueError, match="follows the learning rate; give the optimizer"):
        sparsify.Pruner(net(), group)


def test_a_lottery_ticket_goes_back_to_its_early_weights():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = {"kind": "exponential", "start": 2, "end": 8, "every": 3}
    pruner = sparsify.Pruner(
        model, recipe(sparsity=0.75, allocation="global", rewind=2, schedule=schedule), optimizer=optimizer
    )
    train(model, pruner, optimizer, 2)
    early = {name: p.detach().clone() for name, p in model.named_parameters()}
    for first, wanted in ((2, 0.5), (5, 0.75)):
        train(model, pruner, optimizer, 2, first=first)
        assert not torch.equal(model[0].bias, early["0.bias"])
        train(model, pruner, optimizer, 1, first=first + 2)
        assert pruner.sparsity == pytest.approx(wanted, abs=0.003)
        for name, layer in (("0", model[0]), ("2", model[2])):
            assert torch.equal(layer.weight, early[f"{name}.weight"] * layer.mask)
            assert torch.equal(layer.bias, early[f"{name}.bias"])
        assert not optimizer.state
    assert not all(layer.mask.all() for layer in layers(model))


def test_ac_dc_is_dense_and_sparse_in_turns():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    schedule = {"kind": "alternating", "start": 2, "every": 2, "end": 8}
    pruner = sparsify.Pruner(model, recipe(sparsity=0.75, schedule=schedule), optimizer=optimizer)
    seen = []
    for step in range(10):
        train(model, pruner, optimizer, 1, first=step)
        seen.append(round(pruner.sparsity, 2))
    assert seen == [0.0, 0.75, 0.75, 0.0, 0.0, 0.75, 0.75, 0.75, 0.75, 0.75]


def test_hold_keeps_the_zeros_of_a_checkpoint_and_no_others():
    model = net()
    sparsify.prune(model, 0.8)
    dense = sparsify.to_dense(model)
    zeros = [dense[i].weight == 0 for i in (0, 2)]
    model = sparsify.convert(dense)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    pruner = sparsify.Pruner(model, sparsify.load_recipe("recipes/hold.yaml"), optimizer=optimizer)
    train(model, pruner, optimizer, 20)
    assert [torch.equal(~layer.mask, zero) for layer, zero in zip(layers(model), zeros, strict=True)] == [True, True]
    assert all(torch.equal(layer.weight == 0, zero) for layer, zero in zip(layers(model), zeros, strict=True))
    sparsify.apply(sparsify.convert(nn.Sequential(nn.Linear(4, 2))), sparsify.load_recipe("recipes/hold.yaml"))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"method": "hold", "sparsity": 0.5}, "'sparsity' has no effect with method 'hold'"),
        ({"sparsity": 0.5, "schedule": constant(5)}, "no effect without 'regrow'"),
        ({"sparsity": 0.5, "regrow": {"by": "random"}}, "'regrow' has no effect at one update only"),
        ({"sparsity": 0.5, "masked": "trained"}, "'masked' has no effect at one update only"),
        ({"sparsity": 0.5, "masked": "frozen", "decay": 1.0, "schedule": constant(5)}, "'decay' has no effect"),
        ({"pattern": "2:4", "regrow": {"by": "random"}, "schedule": constant(5)}, "no N:M pattern"),
        (
            {"sparsity": 0.5, "masked": "trained", "regrow": {"by": "random"}, "schedule": constant(5)},
            "'regrow' goes with masked weights at zero",
        ),
        (
            {"sparsity": 0.5, "rewind": 3, "schedule": {"kind": "one-shot", "start": 2}},
            "after the first update, 2, got 3",
        ),
        ({"sparsity": 0.5, "regrow": {"by": "magic"}, "schedule": constant(5)}, "random"),
        ({"sparsity": 0.5, "regrow": {"by": "random", "fraction": 1.5}, "schedule": constant(5)}, "less than 1"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        recipe(**group)


def test_all_groups_rewind_to_one_step():
    groups = [
        {"layers": ["0"], "sparsity": 0.5, "rewind": 0, "schedule": {"kind": "one-shot", "start": 2}},
        {"layers": ["2"], "sparsity": 0.5, "rewind": 1, "schedule": {"kind": "one-shot", "start": 2}},
    ]
    with pytest.raises(ValueError, match="all groups must rewind to one time"):
        sparsify.Pruner(net(), sparsify.Recipe(groups=groups))

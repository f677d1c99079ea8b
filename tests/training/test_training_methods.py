"""Methods whose masked weights train, wait or go back, each against the formula of its paper."""

import pytest
import torch
from cases import masks, weight
from method_steps import LR, batch, constant, largest, layers, net, recipe, train, used_gradients
from torch import nn

import sparsify
from sparsify.layers.masked_weight import masked_weight

pytestmark = pytest.mark.usefixtures("one_thread")


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

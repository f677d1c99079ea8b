"""Dynamic sparse training, RigL and SET, against the formulas of their papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from method_steps import LR, batch, constant, largest, layers, net, recipe, train, used_gradients

import sparsify
from sparsify.masking.patterns import parse_pattern
from sparsify.masking.regrowth import drop_and_grow

pytestmark = pytest.mark.usefixtures("one_thread")


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

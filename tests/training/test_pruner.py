"""A recipe inside a training loop: the target is met exactly, and masked weights are zero after every step."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsify

OPTIMIZERS = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=1e-1),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=1e-1, amsgrad=True),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    """Return (images, labels) of scikit-learn's digits for training and for test, images in [0, 1]."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn holds the digits; pip install scikit-learn")
    data = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    return (x[:1500], y[:1500]), (x[1500:], y[1500:])


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))


def batches(data, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = data
    for index in torch.randperm(len(x), generator=generator).split(size):
        yield x[index], y[index]


def train_step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def accuracy(model, data):
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def assert_masked_are_zero(model):
    layers = [m for m in model.modules() if isinstance(m, sparsify.SparseLinear)]
    assert layers
    for layer in layers:
        assert int(torch.count_nonzero(layer.weight[~layer.mask])) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradual_recipe_on_digits_meets_the_target_and_holds_masked_weights_at_zero(name, digits):
    train, test = digits
    model = sparsify.convert(mlp())
    optimizer = OPTIMIZERS[name](model.parameters())
    recipe = sparsify.load_recipe("recipes/gradual-magnitude-90.yaml", start=1, end=8, every=0.25)
    n_epochs, size = 14, 64
    steps_per_epoch = -(-len(train[0]) // size)
    pruner = sparsify.Pruner(
        model,
        recipe,
        optimizer=optimizer,
        steps_per_epoch=steps_per_epoch,
        total_steps=n_epochs * steps_per_epoch,
    )
    seen = set()
    for epoch in range(n_epochs):
        for x, y in batches(train, size, epoch):
            train_step(model, optimizer, x, y)
            pruner.step()
            seen.add(pruner.sparsity)
            assert_masked_are_zero(model)
    assert len(seen) > 20  # it was gradual
    for layer in (model[0], model[2], model[4]):
        numel = layer.weight.numel()
        assert int((~layer.mask).sum()) == round(0.9 * numel)
        assert int((layer.weight == 0).sum()) == round(0.9 * numel)
    assert accuracy(model, test) > 0.8


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_of_masked_weights_is_cleared_when_they_go(name, digits):
    """After a mask in mid-training, nothing is left that would move a masked weight: not even without step()."""
    train, _ = digits
    model = sparsify.convert(mlp())
    optimizer = OPTIMIZERS[name](model.parameters())
    recipe = sparsify.Recipe.model_validate(
        {"groups": [{"sparsity": 0.9, "schedule": {"kind": "one-shot", "start": 5}}]}
    )
    pruner = sparsify.Pruner(model, recipe, optimizer=optimizer)
    steps = itertools.chain.from_iterable(batches(train, 64, epoch) for epoch in range(2))
    for x, y in itertools.islice(steps, 5):
        train_step(model, optimizer, x, y)
        pruner.step()
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    kept_before = model[0].weight[model[0].mask].clone()
    for x, y in itertools.islice(steps, 10):
        train_step(model, optimizer, x, y)
        assert_masked_are_zero(model)
    assert not torch.equal(kept_before, model[0].weight[model[0].mask])


def test_step_zeroes_what_an_unknown_optimizer_revived(digits):
    train, _ = digits
    model = sparsify.convert(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recipe = sparsify.Recipe.model_validate(
        {"groups": [{"sparsity": 0.9, "schedule": {"kind": "one-shot", "start": 3}}]}
    )
    pruner = sparsify.Pruner(model, recipe)  # the optimizer is not known to it
    revived = False
    for x, y in itertools.islice(batches(train, 64, 0), 8):
        train_step(model, optimizer, x, y)
        revived |= bool((model[0].weight[~model[0].mask] != 0).any())
        pruner.step()
        assert_masked_are_zero(model)
    assert revived  # or this test would show nothing


def test_a_masked_weight_takes_no_part_even_before_step(digits):
    """Momentum may move a masked weight in memory; the forward does not see it."""
    layer = sparsify.SparseLinear(8, 4, 0.5, seed=0)
    x = torch.randn(3, 8)
    before = layer(x)
    with torch.no_grad():
        layer.weight[~layer.mask] = 7.0
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


def test_stopping_and_going_on_gives_the_same_masks_and_weights(digits):
    train, _ = digits
    recipe = sparsify.load_recipe("recipes/gradual-magnitude-90.yaml", start=0.1, end=0.8, every=0.1)

    def fresh():
        model = sparsify.convert(mlp())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        return model, optimizer, sparsify.Pruner(model, recipe, optimizer=optimizer, steps_per_epoch=24)

    whole, optimizer, pruner = fresh()
    saved = None
    for n, (x, y) in enumerate(batches(train, 64, 0)):
        if n == 11:
            saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), pruner.state_dict()))
        train_step(whole, optimizer, x, y)
        pruner.step()
    resumed, optimizer, pruner = fresh()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    pruner.load_state_dict(saved[2])
    for x, y in itertools.islice(batches(train, 64, 0), 11, None):
        train_step(resumed, optimizer, x, y)
        pruner.step()
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_constant_schedule_masks_at_once_and_a_lower_target_is_not_undone():
    model = sparsify.convert(mlp())
    recipe = sparsify.Recipe.model_validate({"groups": [{"sparsity": 0.5}]})
    pruner = sparsify.Pruner(model, recipe)
    assert pruner.sparsity == 0.5
    mask = model[0].mask.clone()
    pruner.step()
    assert torch.equal(mask, model[0].mask)


def test_groups_follow_their_own_schedules():
    model = sparsify.convert(mlp())
    recipe = sparsify.Recipe.model_validate(
        {
            "groups": [
                {"layers": ["0"], "sparsity": 0.8, "schedule": {"kind": "one-shot", "start": 2}},
                {
                    "layers": ["2", "4"],
                    "allocation": {"2": 0.5, "4": 0.25},
                    "schedule": {"kind": "linear", "end": 2, "every": 1},
                },
            ]
        }
    )
    pruner = sparsify.Pruner(model, recipe)
    sparsities = []
    for _ in range(2):
        pruner.step()
        sparsities.append(tuple(round(model[i].sparsity, 3) for i in (0, 2, 4)))
    assert sparsities == [(0.0, 0.25, 0.125), (0.8, 0.5, 0.25)]


def test_nm_in_training_starts_when_its_schedule_says():
    model = sparsify.convert(nn.Sequential(nn.Linear(8, 4)))
    recipe = sparsify.Recipe.model_validate(
        {"groups": [{"pattern": "2:4", "schedule": {"kind": "one-shot", "start": 1}}]}
    )
    pruner = sparsify.Pruner(model, recipe)
    assert pruner.sparsity == 0
    pruner.step()
    assert pruner.sparsity == 0.5
    assert (model[0].mask.reshape(-1, 4).sum(1) == 2).all()


def test_global_allocation_is_ranked_over_the_layers_of_its_group():
    model = sparsify.convert(mlp())
    with torch.no_grad():
        model[0].weight *= 100
    recipe = sparsify.Recipe.model_validate({"groups": [{"sparsity": 0.4, "allocation": "global"}]})
    pruner = sparsify.Pruner(model, recipe)
    total = sum(layer.weight.numel() for layer in (model[0], model[2], model[4]))
    assert sum(int((~layer.mask).sum()) for layer in (model[0], model[2], model[4])) == round(0.4 * total)
    assert model[0].sparsity < 0.05 < 0.85 < model[2].sparsity
    assert pruner.sparsity == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "give steps_per_epoch"),
        ({"steps_per_epoch": 10, "total_steps": 50}, "ends at step 60, after the training's last, 50"),
    ],
)
def test_a_schedule_that_cannot_end_is_refused_before_anything_changes(kwargs, message):
    model = sparsify.convert(mlp())
    recipe = sparsify.load_recipe("recipes/gradual-magnitude-90.yaml")
    with pytest.raises(ValueError, match=message):
        sparsify.Pruner(model, recipe, **kwargs)
    assert all(model[i].mask.all() for i in (0, 2, 4))


def test_an_unconverted_model_is_refused():
    recipe = sparsify.Recipe.model_validate({"groups": [{"sparsity": 0.5}]})
    with pytest.raises(ValueError, match=r"call sparsify\.convert"):
        sparsify.Pruner(mlp(), recipe)


@pytest.mark.parametrize("state", [{}, {"version": 2, "n_steps": 1}, {"version": 1, "n_steps": "3"}])
def test_a_foreign_state_is_refused(state):
    pruner = sparsify.Pruner(sparsify.convert(mlp()), sparsify.Recipe.model_validate({"groups": [{"sparsity": 0.5}]}))
    with pytest.raises(ValueError, match="not a Pruner's state"):
        pruner.load_state_dict(state)

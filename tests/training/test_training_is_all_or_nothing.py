"""A failed call of a Pruner or of apply changes nothing: not the model, the optimizer, nor the Pruner."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pruned_training import batch, net, recipe, start, train
from torch.utils._python_dispatch import TorchDispatchMode

import sparsify

pytestmark = pytest.mark.usefixtures("one_thread")


class FailAt(TorchDispatchMode):
    """Raise at the n-th operation of torch."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))


def everything(model, optimizer=None, pruner=None):
    """Return all that a failed call must leave as it was."""
    layers = [layer for layer in model.modules() if isinstance(layer, sparsify.SparseLinear)]
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "gradients": [p.grad for p in model.parameters()],
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "pruner": None if pruner is None else pruner.state_dict(),
            "layers": [
                (layer.masked_mode, layer.training_kernels is None, vars(layer).get("accumulator")) for layer in layers
            ],
        }
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dict__"):
        return same(vars(one), vars(other))
    return one == other


def count_failures(make, act):
    """Let `act` fail at one operation after the other: all stays as it was, and done again it ends as it should."""
    parts = make()
    act(*parts)
    done, failures, n = everything(*parts), 0, 0
    while True:
        parts = make()
        before = everything(*parts)
        try:
            with FailAt(n):
                act(*parts)
        except KeyboardInterrupt:
            assert same(everything(*parts), before), f"operation {n}"
        else:
            return failures
        if failures % 8 == 0:
            act(*parts)
            assert same(everything(*parts), done), f"operation {n}"
        failures += 1
        n += 1 if n < 10 else 13  # a sample, to be quick: all of them take a minute


@pytest.mark.parametrize(
    "group",
    [
        {},
        {"masked": "frozen", "method": "movement"},
        {"regrow": {"by": "gradient"}},
        {"rewind": 0, "allocation": "global"},
    ],
    ids=["gradual", "movement", "rigl", "rewinding"],
)
def test_a_step_that_fails_anywhere_changes_nothing(group):
    began = start(**group)
    model, optimizer, pruner = began
    train(model, pruner, optimizer, range(3))
    x, y = batch(3)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert count_failures(lambda: copy.deepcopy(began), lambda model, optimizer, pruner: pruner.step()) > 15


def test_a_pruner_that_cannot_be_made_leaves_the_model_as_it_was():
    def make():
        model = net()
        return model, torch.optim.Adam(model.parameters())

    def act(model, optimizer):
        sparsify.Pruner(
            model,
            recipe(schedule={"kind": "constant", "end": 4, "every": 1}, regrow={"by": "gradient"}),
            optimizer=optimizer,
            sparse_backward="always",
        )

    assert count_failures(make, act) > 15


@pytest.mark.parametrize("recover", [None, {"steps": 2}])
def test_an_apply_that_fails_anywhere_changes_nothing(recover, monkeypatch):
    data = [batch(0)[0]] if recover else None
    groups = [{"layers": [name], "sparsity": 0.5} for name in ("0", "2")]
    once = sparsify.Recipe(groups=groups, recover=recover)
    if recover:
        model = net()
        before = everything(model)

        def fail(pruned, *args, **options):
            assert pruned[0].sparsity == 0.5
            pruned[0].bias.data.zero_()
            raise KeyboardInterrupt

        monkeypatch.setattr("sparsify.recipes.apply.recover", fail)
        with pytest.raises(KeyboardInterrupt):
            sparsify.apply(model, once, data=data)
        assert same(everything(model), before)
    else:
        assert count_failures(lambda: (net(),), lambda model: sparsify.apply(model, once)) > 5


def test_a_bad_second_group_leaves_the_first_as_it_was():
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    groups = [{"layers": [name], "sparsity": 0.5} for name in ("0", "2")]
    for act in (sparsify.Pruner, sparsify.apply):
        with pytest.raises(ValueError, match="2: the weight holds NaN"):
            act(model, sparsify.Recipe(groups=groups))
        assert model[0].mask.all()
        assert model[0].training_kernels is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch_began": None}, "not a Pruner's state"),
        ({"movement": 3}, "not a Pruner's state"),
        ({"movement": {"0": torch.zeros(2, 2)}}, "'0' has other weights there"),
        ({"masks": {"0": 1}}, "'2' is in only one of both"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(change, message):
    model, optimizer, pruner = start()
    train(model, pruner, optimizer, range(3))
    before = everything(model, optimizer, pruner)
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict(pruner.state_dict() | change)
    assert same(everything(model, optimizer, pruner), before)


@pytest.mark.filterwarnings("ignore::sparsify.RemovedLayerWarning")
@pytest.mark.parametrize(
    "group",
    [
        {"allocation": "global"},
        {"regrow": {"by": "gradient"}},
        {"regrow": {"by": "random"}},
        {"method": "movement", "masked": "frozen"},
        {"method": "random", "seed": 1},
        {"rewind": 0},
    ],
)
def test_the_default_device_changes_nothing(group):
    """Device meta stands for a GPU: a tensor made there by mistake has no data."""

    def trained(device):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with device:
            pruner = sparsify.Pruner(model, recipe(**group), optimizer=optimizer)
        for step in range(9):
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            with device:
                pruner.step()
        with device:
            pruner.finish()
            pruner.load_state_dict(pruner.state_dict())
        return model.state_dict()

    assert same(trained(torch.device("meta")), trained(torch.device("cpu")))

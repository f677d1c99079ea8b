"""Masks that miss their target are noticed, sparsity that is there stays, and a failed call changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsify

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = {"kind": "linear", "end": 8, "every": 2}


def net():
    torch.manual_seed(0)
    return sparsify.convert(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)))


def recipe(**group):
    return sparsify.Recipe(groups=[{"sparsity": 0.9, "schedule": LINEAR, **group}])


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randint(4, (8,), generator=generator)


def train(model, pruner, optimizer, steps):
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()


def start(model=None, **group):
    model = net() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer, sparsify.Pruner(model, recipe(**group), optimizer=optimizer)


# Targets


@pytest.mark.filterwarnings("ignore::sparsify.RemovedLayerWarning")
@pytest.mark.parametrize("allocation", ["uniform", "global", "erk", {"0": 0.8, "*": 0.9}])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_an_earlier_checkpoint_loaded_at_the_end_misses_the_target(allocation, pattern):
    model, optimizer, pruner = start(
        allocation=allocation, pattern=pattern, sparsity=None if isinstance(allocation, dict) else 0.75
    )
    train(model, pruner, optimizer, range(5))
    early = copy.deepcopy(model.state_dict())
    train(model, pruner, optimizer, range(5, 10))
    pruner.finish()
    model.load_state_dict(early)
    with pytest.raises(RuntimeError, match=r"groups.0: the masks miss the target, 0.*instead of 0\.\d+.*checkpoint"):
        pruner.finish()


def test_a_nm_target_is_counted_in_its_groups():
    model = net()
    pruner = sparsify.Pruner(model, sparsify.Recipe(groups=[{"pattern": "2:4"}]))
    pruner.finish()
    for layer in (model[0], model[2]):
        layer.sparse_update(0.5)
        layer.set_mask(torch.arange(layer.weight.numel()).view_as(layer.weight) % 8 < 4)
    assert pruner.sparsity == 0.5  # as many as before, and no 2:4
    with pytest.raises(RuntimeError, match=r"0: 0\.25 instead of 0\.5; 2: 0\.25 instead of 0\.5"):
        pruner.finish()


def test_masks_that_go_back_on_the_way_are_noticed_once_and_forgotten_by_the_optimizer():
    model, optimizer, pruner = start()
    train(model, pruner, optimizer, range(3))
    early = copy.deepcopy(model.state_dict())
    train(model, pruner, optimizer, range(3, 9))
    model.load_state_dict(early)
    for state in optimizer.state.values():
        state["exp_avg"].fill_(1.0)
    with pytest.warns(sparsify.ScheduleWarning, match=r"miss the target of step 9, 0: 0.2\d* instead of 0.9"):
        pruner.step()
    for layer in (model[0], model[2]):
        moment = optimizer.state[layer.weight]["exp_avg"]
        assert torch.equal(moment != 0, layer.mask)
        assert torch.count_nonzero(layer.weight[~layer.mask]) == 0
    pruner.step()


def test_the_same_state_loaded_again_is_no_change():
    model, optimizer, pruner = start()
    train(model, pruner, optimizer, range(5))
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.to("cpu").double().float()
    train(model, pruner, optimizer, range(5, 9))
    pruner.finish()


def test_finish_zeroes_what_was_loaded_with_other_weights():
    model, optimizer, pruner = start()
    train(model, pruner, optimizer, range(9))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    pruner.finish()
    assert torch.equal(model[0].weight != 0, model[0].mask)


# Sparsity that is there


@pytest.mark.parametrize("group", [{}, {"allocation": "global"}, {"masked": "frozen"}, {"regrow": {"by": "random"}}])
def test_a_schedule_from_zero_keeps_the_sparsity_it_finds_until_it_passes_it(group):
    model, optimizer, pruner = start(sparsify.prune(net(), 0.6), **group)
    seen = [pruner.sparsity]
    for step in range(9):
        train(model, pruner, optimizer, [step])
        seen.append(round(pruner.sparsity, 2))
    assert seen[0] == pytest.approx(0.6, abs=0.01)
    assert seen == sorted(seen)
    assert seen[-1] == 0.9
    pruner.finish()


def test_more_than_the_target_stays_and_is_said():
    model = sparsify.prune(net(), 0.95)
    with pytest.warns(sparsify.ScheduleWarning, match=r"sparser than the recipe's target, 0: 0.9479 instead of 0.901"):
        model, optimizer, pruner = start(model)
    train(model, pruner, optimizer, range(9))
    assert pruner.sparsity > 0.94
    with pytest.warns(sparsify.ScheduleWarning, match="the masks remove more than the target"):
        pruner.finish()


def test_a_mask_of_another_pattern_is_refused_where_weights_would_come_back():
    model = sparsify.prune(net(), 0.6)
    with pytest.raises(ValueError, match=r"0: 0.599 of the weights are masked, in another pattern than '2:4'"):
        sparsify.Pruner(model, sparsify.Recipe(groups=[{"pattern": "2:4"}]))
    assert model[0].sparsity == pytest.approx(0.6, abs=0.01)
    sparsify.Pruner(sparsify.prune(model, pattern="2:4"), sparsify.Recipe(groups=[{"pattern": "2:4"}])).finish()


def test_a_schedule_that_falls_gives_weights_back():
    for schedule, expected in (
        ({"kind": "steps", "points": [(1, 0.5), (2, 0.9), (3, 0.75)]}, [0, 0.5, 0.9, 0.75]),
        ({"kind": "alternating", "start": 1, "every": 1, "end": 3}, [0, 0.75, 0, 0.75]),
    ):
        pruner = sparsify.Pruner(net(), recipe(sparsity=0.75, schedule=schedule))
        seen = [pruner.sparsity]
        for _ in range(3):
            pruner.step()
            seen.append(pruner.sparsity)
        assert seen == pytest.approx(expected, abs=0.01)
        pruner.finish()


def test_weights_come_back_at_zero_whatever_an_optimizer_has_made_of_them():
    model = net()
    pruner = sparsify.Pruner(model, recipe(sparsity=0.5, schedule={"kind": "steps", "points": [(1, 0.9), (2, 0.5)]}))
    pruner.step()
    old = model[0].mask
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # as momentum would that this Pruner does not know
    pruner.step()
    assert int((model[0].mask & ~old).sum()) > 50
    assert torch.equal(model[0].weight != 0, model[0].mask & old)


# Nothing to go by


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(12, 16).requires_grad_(False)
        self.head, self.unused = nn.Linear(16, 4), nn.Linear(8, 8)
        sparsify.convert(self)

    def forward(self, x):
        return self.head(self.frozen(x).relu())


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_movement_without_a_gradient_names_every_such_layer_and_changes_nothing(allocation):
    model, optimizer, pruner = start(Branches(), method="movement", masked="frozen", allocation=allocation)
    train(model, pruner, optimizer, [0])
    with pytest.raises(
        ValueError, match=r"frozen, unused: no gradient.*position alone.*exclude=\['frozen', 'unused'\]"
    ):
        train(model, pruner, optimizer, [1])
    assert pruner.sparsity == 0
    model, optimizer, pruner = start(Branches(), method="movement", masked="frozen", exclude=["frozen", "unused"])
    train(model, pruner, optimizer, range(9))
    pruner.finish()


@pytest.mark.parametrize(("method", "shown"), [("snip", "zero"), ("grasp", "zero"), ("snip", "nothing")])
def test_a_loss_that_shows_nothing_is_refused(method, shown):
    model = Branches()
    model.frozen.requires_grad_(True)

    def loss():
        value = model(batch(0)[0]).square().sum()
        return value * 0 if shown == "zero" else value

    layers = {"layers": ["head", "frozen"]} if shown == "zero" else {}
    names = "frozen, head: no gradient" if shown == "zero" else "unused: the loss given does not depend on its weight"
    with pytest.raises(ValueError, match=names):
        sparsify.Pruner(model, recipe(method=method, schedule={"kind": "constant"}, **layers), loss=loss)
    assert model.head.mask.all()


def test_rigl_without_a_gradient_keeps_the_mask_and_says_so():
    model, optimizer, pruner = start(
        Branches(), regrow={"by": "gradient"}, schedule={"kind": "constant", "end": 4, "every": 2}
    )
    before = [model.frozen.mask, model.unused.mask, model.head.mask]
    with pytest.warns(sparsify.ScheduleWarning, match="frozen, unused: no gradient has reached these layers"):
        train(model, pruner, optimizer, range(2))
    assert torch.equal(model.frozen.mask, before[0])
    assert torch.equal(model.unused.mask, before[1])
    assert not torch.equal(model.head.mask, before[2])


def test_a_layer_that_training_removes_whole_is_said_once():
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    pruner = sparsify.Pruner(model, recipe(allocation="global", sparsity=0.8))
    for _ in range(3):
        pruner.step()
    with pytest.warns(sparsify.RemovedLayerWarning, match="2: all weights are removed.*max_sparsity"):
        pruner.step()
    for _ in range(4):  # it stays so, and that is said already
        pruner.step()


# All or nothing


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

        monkeypatch.setattr("sparsify.recipes.recipe.recover", fail)
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


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = sparsify.convert(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="0: the weight is on the meta device"):
        sparsify.Pruner(model, recipe())

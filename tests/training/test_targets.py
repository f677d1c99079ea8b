"""Masks off their target are noticed, present sparsity stays, and a layer without gradients is named."""

import copy

import pytest
import torch
from pruned_training import batch, net, recipe, start, train
from torch import nn

import sparsify

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = sparsify.convert(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="0: the weight is on the meta device"):
        sparsify.Pruner(model, recipe())

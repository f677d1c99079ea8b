"""Masked means zero, whatever optimizer, precision or loop; and what an optimizer remembers goes with a weight."""

import copy
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsify
from sparsify.training.optimizer_state import forget

pytestmark = pytest.mark.usefixtures("one_thread")

#: Every optimizer of torch but LBFGS, whose step is a loop of its own.
CLASSES = {
    name: value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
}
#: What makes masked weights move where the optimizer has it, and the ways it is computed.
OPTIONS = {"momentum": 0.9, "weight_decay": 0.05, "amsgrad": True, "nesterov": True, "centered": True}
VARIANTS = ("plain", "foreach", "fused")


def cases():
    for name, kind in CLASSES.items():
        takes = inspect.signature(kind).parameters
        for variant in VARIANTS:
            if variant == "plain" or variant in takes:
                options = {key: value for key, value in OPTIONS.items() if key in takes}
                if "foreach" in takes:
                    options["foreach"] = variant == "foreach"
                if variant == "fused":
                    options = {**{k: v for k, v in options.items() if k != "foreach"}, "fused": True}
                yield pytest.param(kind, options, id=f"{name}-{variant}")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 24, generator=generator), torch.randint(8, (16,), generator=generator)


def masked(model):
    return torch.cat([layer.weight[~layer.mask] for layer in model if isinstance(layer, sparsify.SparseLinear)])


def one_shot(at=0, sparsity=0.9):
    return sparsify.Recipe(groups=[{"sparsity": sparsity, "schedule": {"kind": "one-shot", "start": at}}])


@pytest.mark.parametrize(("kind", "options"), list(cases()))
def test_masked_weights_are_zero_and_kept_ones_move(kind, options):
    model = sparsify.convert(net())
    sparse_only = kind is torch.optim.SparseAdam
    weights = [layer.weight for layer in (model[0], model[2])]
    optimizer = kind(weights if kind is torch.optim.Muon else model.parameters(), lr=0.01, **options)
    pruner = sparsify.Pruner(model, one_shot(at=5), optimizer=optimizer)
    for step in range(55):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if sparse_only:
            for parameter in model.parameters():
                parameter.grad = parameter.grad.to_sparse()
        optimizer.step()
        pruner.step()
        if step == 4:
            before = [weight.detach().clone() for weight in weights]
        if step >= 4:
            assert torch.count_nonzero(masked(model)) == 0
    has_a_way_out = model[2].mask.any(0)[:, None]  # a hidden unit that nothing reads has no gradient
    for layer, old, used in zip((model[0], model[2]), before, (has_a_way_out, True), strict=True):
        assert layer.sparsity == pytest.approx(0.9, abs=0.01)
        assert (layer.weight != old)[layer.mask & used].float().mean() > 0.95


def test_there_are_optimizers():
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Rprop", "Muon", "SparseAdam", "Adafactor"} <= set(CLASSES)
    assert len(list(cases())) > 25


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("SparseAdam", "Muon")])
def test_forgetting_sets_state_to_what_a_fresh_optimizer_has(name):
    """The state of chosen weights becomes that of an optimizer which has seen gradients of zero only."""
    options = {key: value for key, value in OPTIONS.items() if key in inspect.signature(CLASSES[name]).parameters}
    options.pop("weight_decay", None)
    if name == "Adagrad":
        options["initial_accumulator_value"] = 0.25

    def state_after(gradients):
        parameter = nn.Parameter(torch.ones(4, 3))
        optimizer = CLASSES[name]([parameter], lr=0.125, **options)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        return optimizer, parameter

    used, parameter = state_after([torch.randn(4, 3) for _ in range(3)])
    fresh, other = state_after([torch.zeros(4, 3)])
    where = torch.rand(4, 3) < 0.5
    before = copy.deepcopy(used.state[parameter])
    parameter.grad = torch.ones(4, 3)
    forget(used, parameter, where)
    assert torch.equal(parameter.grad, (~where).float())
    elementwise = 0
    for key, value in used.state[parameter].items():
        if isinstance(value, torch.Tensor) and value.shape == where.shape and key not in ("ax", "prev"):
            elementwise += 1
            torch.testing.assert_close(value[where], fresh.state[other][key][where])
            assert torch.equal(value[~where], before[key][~where])
    assert elementwise or name in ("Adafactor", "ASGD")


def test_a_weight_that_comes_back_starts_without_a_past():
    model = sparsify.convert(net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = {"kind": "steps", "points": [[3, 0.9], [8, 0.5]]}
    pruner = sparsify.Pruner(
        model, sparsify.Recipe(groups=[{"sparsity": 0.5, "schedule": schedule}]), optimizer=optimizer
    )
    for step in range(8):
        optimizer.zero_grad()
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step == 7:
            optimizer.state[model[0].weight]["exp_avg"].fill_(7.0)  # whatever it had become meanwhile
            old = model[0].mask.clone()
        pruner.step()
    state, mask = optimizer.state[model[0].weight], model[0].mask
    assert int((mask & ~old).sum()) > 100
    assert torch.count_nonzero(state["exp_avg"][~old]) == 0
    assert (state["exp_avg"][old] == 7).all()
    assert torch.count_nonzero(model[0].weight[~old]) == 0


def test_amp_with_a_scaler_that_skips_steps_accumulation_and_clipping():
    model = sparsify.convert(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=4)
    recipe = sparsify.Recipe(
        groups=[
            {
                "sparsity": 0.9,
                "allocation": "erk",
                "regrow": {"by": "gradient"},
                "schedule": {"kind": "constant", "end": 20, "every": 2},
            }
        ]
    )
    pruner = sparsify.Pruner(model, recipe, optimizer=optimizer, scaler=scaler)
    before, n_skipped = model[0].weight.detach().clone(), 0
    for step in range(30):
        optimizer.zero_grad()
        for part in range(2):
            x, y = batch(2 * step + part)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y) / 2
            if step in (3, 7):
                loss = loss * torch.inf
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        old, scale = model[0].weight.detach().clone(), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            n_skipped += 1
            assert torch.equal(model[0].weight, old)
        pruner.step()
        assert torch.count_nonzero(masked(model)) == 0
        kept = int(sum(layer.mask.sum() for layer in (model[0], model[2])))
        assert kept == 1024 - round(0.9 * 1024)
    assert n_skipped == 2
    assert not torch.equal(before, model[0].weight)
    assert torch.isfinite(model[0].weight).all()


def test_an_average_of_weights_has_the_mask_of_now():
    """torch's EMA copies buffers: what was masked takes no part, though its average fades only slowly in memory."""
    model = sparsify.convert(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = {"kind": "linear", "end": 10, "every": 2}
    pruner = sparsify.Pruner(
        model, sparsify.Recipe(groups=[{"sparsity": 0.9, "schedule": schedule}]), optimizer=optimizer
    )
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(12):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        ema.update_parameters(model)
    for layer, averaged in ((model[0], ema.module[0]), (model[2], ema.module[2])):
        assert torch.equal(layer.mask, averaged.mask)
        assert torch.count_nonzero(averaged.masked_weight()[~layer.mask]) == 0
    dense = sparsify.to_dense(copy.deepcopy(ema.module))
    torch.testing.assert_close(dense(x), ema(x), rtol=0, atol=0)
    assert int((dense[0].weight == 0).sum()) == int((~model[0].mask).sum())
    assert sparsify.export(ema.module).state_dict()


def test_a_weight_read_outside_its_layer_is_held_too():
    model = sparsify.convert(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = sparsify.Pruner(model, one_shot(), optimizer=optimizer)
    for step in itertools.islice(range(5), 5):
        x, y = batch(step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + model[0].weight.sum()).backward()
        optimizer.step()
        assert torch.count_nonzero(model[0].weight[~model[0].mask])
        pruner.step()
        assert torch.count_nonzero(masked(model)) == 0

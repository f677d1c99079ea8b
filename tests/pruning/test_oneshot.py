"""Pruning on calibration data: exact, all or nothing, in any precision, and each method what its paper says."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, weight
from torch import Tensor, nn

import sparsify
from sparsify import Recipe, SparseLinear, apply, convert, prune
from sparsify.calibration.activation_store import SpillingTensorList
from sparsify.masking.allocation import ALLOCATIONS, MEASURED_ALLOCATIONS
from sparsify.masking.gram import Gram
from sparsify.masking.layer_solve import weight_for_dense_outputs
from sparsify.masking.methods.registry import CALIBRATED, METHODS, SOLVERS
from sparsify.masking.methods.wanda import wanda
from sparsify.recipes.dry_run import plan

NEED_DATA = (*CALIBRATED, *SOLVERS)
X = weight((64, 16), seed=9)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8)))


def layers(net: nn.Module) -> list[SparseLinear]:
    return [module for module in net.modules() if isinstance(module, SparseLinear)]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("method", [*METHODS, *NEED_DATA])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("allocation", [*ALLOCATIONS, *MEASURED_ALLOCATIONS])
def test_the_number_of_zeros_is_exact(method: str, sparsity: float, allocation: str) -> None:
    if allocation == "global" and method in SOLVERS:
        with pytest.raises(ValueError, match="allocation 'global' ranks scores, and method"):
            prune(model(), sparsity, method=method, allocation=allocation, data=[X])
        return
    net = prune(model(), sparsity, method=method, allocation=allocation, data=[X])
    zeros = [int((layer.weight == 0).sum()) for layer in layers(net)]
    sizes = [layer.weight.numel() for layer in layers(net)]
    if allocation == "uniform":
        assert zeros == [round(sparsity * size) for size in sizes]
    else:
        assert sum(zeros) == round(sparsity * sum(sizes))
    for layer in layers(net):
        assert torch.equal(layer.mask, layer.weight != 0)


@pytest.mark.parametrize("method", NEED_DATA)
@pytest.mark.parametrize("pattern", ["2:4", "1x4", "4x1", "rows", "columns"])
def test_patterns(method: str, pattern: str) -> None:
    net = prune(model(), None if pattern == "2:4" else 0.5, method=method, pattern=pattern, data=[X])
    for layer in layers(net):
        assert layer.sparsity == 0.5
        shape = {"2:4": (-1, 1, 1, 4), "1x4": (-1, 1, 1, 4), "4x1": (3 if layer.out_features == 12 else 2, 4, -1, 1)}
        if pattern in shape:
            kept = layer.mask.reshape(*shape[pattern]).sum((1, 3))
            assert set(kept.flatten().tolist()) == ({2} if pattern == "2:4" else {0, 4})
        else:
            assert all(len(row.unique()) == 1 for row in (layer.mask if pattern == "rows" else layer.mask.T))


@pytest.mark.parametrize("method", NEED_DATA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_any_precision(method: str, dtype: torch.dtype) -> None:
    net = prune(model().to(dtype), 0.5, method=method, data=[X.to(dtype)])
    wide = prune(model().double(), 0.5, method=method, data=[X.double()])
    for layer, exact in zip(layers(net), layers(wide), strict=True):
        assert layer.weight.dtype == dtype
        assert layer.sparsity == 0.5
        assert (layer.mask == exact.mask).double().mean() > 0.9
    assert net(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("method", NEED_DATA)
def test_the_same_twice_and_masks_nest(method: str) -> None:
    one, two = (prune(model(), 0.5, method=method, data=[X]) for _ in range(2))
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    before = [layer.mask.clone() for layer in layers(one)]
    prune(one, 0.75, method=method, data=[X])
    for layer, old in zip(layers(one), before, strict=True):
        assert layer.sparsity == 0.75
        assert not bool((layer.mask & ~old).any())


def test_wanda_is_what_its_paper_says() -> None:
    w, x = weight((6, 10)), weight((50, 10), seed=2)
    norms = [sum(float(x[i, j]) ** 2 for i in range(50)) ** 0.5 for j in range(10)]
    expected = torch.tensor([[abs(float(w[i, j])) * norms[j] for j in range(10)] for i in range(6)])
    torch.testing.assert_close(wanda(w, gram=x.double().T @ x.double()).float(), expected)
    net = convert(nn.Linear(10, 6))
    with torch.no_grad():
        net.weight.copy_(w)
    prune(net, 0.4, method="wanda", data=[x])
    for i in range(6):
        smallest = expected[i].argsort()[:4]
        assert set((~net.mask[i]).nonzero().flatten().tolist()) == set(smallest.tolist())


def test_wanda_gives_the_remainder_to_the_last_rows() -> None:
    net = prune(convert(nn.Linear(10, 6)), 0.55, method="wanda", data=[weight((50, 10))])
    assert (~net.mask).sum(1).tolist() == [5, 5, 5, 6, 6, 6]


def test_later_layers_see_what_earlier_ones_have_become() -> None:
    net = prune(model(), 0.5, method="wanda", data=[X])
    inputs = net[:4](X).detach()
    norms = inputs.double().square().sum(0).sqrt()
    dense = model()[4]
    scores = dense.weight.detach().abs() * norms
    for row, mask in zip(scores, net[4].mask, strict=True):
        assert row[mask].min() > row[~mask].max()


def test_a_method_of_ones_own() -> None:
    def by_energy(weight: Tensor, *, gram: Tensor) -> Tensor:
        return weight.square() * gram.diagonal().to(weight)

    net = prune(model(), 0.5, method=by_energy, data=[X])
    scores = by_energy(model()[0].weight.detach(), gram=X.double().T @ X.double())
    assert scores[net[0].mask].min() > scores[~net[0].mask].max()


def test_the_report_tells_errors_and_times() -> None:
    net = prune(model(), 0.5, method="sparsegpt", data=[X])
    dense, first = model()[0], sparsify.report(net)[0]
    change = (X @ (dense.weight - net[0].weight).T).norm() / (X @ dense.weight.T).norm()
    assert first.error == pytest.approx(change.item(), rel=1e-4)
    assert first.time_s is not None
    text = str(sparsify.report(net))
    assert f"{first.error:.4f}" in text
    assert any("error" in line.split() for line in text.splitlines())
    assert "error" not in str(sparsify.report(prune(model(), 0.5)))
    exported = sparsify.report(sparsify.export(net, format="csr"))
    assert exported[0].error == first.error


@pytest.mark.parametrize("method", NEED_DATA)
def test_without_data(method: str) -> None:
    with pytest.raises(ValueError, match=f"method '{method}' needs calibration data"):
        prune(model(), 0.5, method=method)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sparsegpt", "correct": True},
        {"method": "wanda", "allocation": "owl"},
        {"method": "sparsegpt", "allocation": "error"},
    ],
)
def test_what_lies_on_disk_meanwhile_changes_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    filed: list[int] = []
    write = SpillingTensorList._write
    monkeypatch.setattr(
        SpillingTensorList, "_write", lambda self, i, tensor: (filed.append(i), write(self, i, tensor))[1]
    )
    batches = [X[:20], X[20:50], X[50:]]
    expected = prune(model(), 0.5, data=batches, **options)
    assert not filed
    for call in (
        lambda: prune(model(), 0.5, data=batches, cache_bytes=2000, **options),
        lambda: apply(model(), Recipe(groups=[{"sparsity": 0.5, **options}]), data=batches, cache_bytes=0),
    ):
        found = call()
        assert filed
        filed.clear()
        assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())
    for n_bytes in (9, 0):
        for call in (
            lambda n: prune(model(), 0.5, cache_bytes=n),
            lambda n: apply(model(), Recipe(groups=[{"sparsity": 0.5}]), cache_bytes=n),
        ):
            with pytest.raises(ValueError, match=f"cache_bytes={n_bytes} has no effect without data"):
                call(n_bytes)


@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(cache_bytes: int | None) -> None:
    net = model()
    with torch.no_grad():
        net[4].weight[0, 0] = float("nan")
    before = state(net)
    with pytest.raises(ValueError, match=r"4: the weight holds NaN"):
        prune(net, 0.5, method="sparsegpt", data=[X], cache_bytes=cache_bytes)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert net[0].pruning_result is None


@pytest.mark.parametrize("options", [{"correct": True, "cache_bytes": 0}, {"allocation": "error"}])
def test_interrupted_anywhere_the_model_is_as_it_was(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    linear, n_calls, n_interrupts = nn.functional.linear, 0, 0

    def interrupted(*args: Any, at: int) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        if n_calls == at:
            raise KeyboardInterrupt
        return linear(*args)

    for at in range(1, 300, 3):
        net, n_calls = model().train(), 0
        before = state(net)
        monkeypatch.setattr(nn.functional, "linear", functools.partial(interrupted, at=at))
        try:
            prune(net, 0.5, method="sparsegpt", data=[X[:30], X[30:]], **options)
        except KeyboardInterrupt:
            n_interrupts += 1
            assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
            assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in net.modules())
            assert all(module.training for module in net.modules())
        else:
            break
    assert n_interrupts > 5


def test_activations_that_overflow_leave_the_model_as_it_was() -> None:
    net = model()
    with torch.no_grad():
        net[2].weight.fill_(3e38)
    before = state(net)
    with pytest.raises(ValueError, match=r"4: its input in batch 0 of the calibration data holds NaN or Inf"):
        prune(net, 0.5, method="sparsegpt", data=[X.abs()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_activations_that_overflow_in_half_precision_say_so() -> None:
    net = model().half()
    with torch.no_grad():
        net[0].weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"^2: its input in batch 0 .* float16 ends at 65504; calibrate in float32"):
        prune(net, 0.5, method="wanda", data=[X.half().abs()])


@pytest.mark.parametrize("method", [*METHODS, *NEED_DATA])
def test_refit_never_raises_the_error(method: str) -> None:
    plain = prune(model(), 0.5, method=method, data=[X])
    fitted = prune(model(), 0.5, method=method, refit=True, data=[X])
    assert torch.equal(plain[0].mask, fitted[0].mask)
    assert fitted[0].pruning_result.error <= plain[0].pruning_result.error * 1.01  # refit minimises the damped error


@pytest.mark.parametrize("allocation", ["global", "erk", "owl", "error"])
def test_a_cap_holds_and_the_total_stays(allocation: str) -> None:
    free = prune(model(), 0.6, method="wanda", allocation=allocation, data=[X])
    cap = max(layer.sparsity for layer in layers(free)) - 0.02
    if cap < 0.6:
        pytest.skip("all layers lose the same")
    held = prune(model(), 0.6, method="wanda", allocation=allocation, max_sparsity=cap, data=[X])
    sizes = [layer.weight.numel() for layer in layers(held)]
    assert max(layer.sparsity for layer in layers(held)) <= cap
    assert sum(int((~layer.mask).sum()) for layer in layers(held)) == round(0.6 * sum(sizes))


def test_a_cap_without_data() -> None:
    net = prune(model(), 0.6, allocation="global", max_sparsity=0.61)
    assert max(layer.sparsity for layer in layers(net)) <= 0.61
    assert sum(int((~layer.mask).sum()) for layer in layers(net)) == round(0.6 * (192 + 144 + 96))
    with pytest.raises(ValueError, match=r"max_sparsity=0.5 for each layer leaves no room for sparsity 0.6"):
        prune(model(), 0.6, allocation="erk", max_sparsity=0.5)
    with pytest.raises(ValueError, match=r"max_sparsity=0\.9 has no effect with allocation 'uniform'"):
        prune(model(), 0.6, max_sparsity=0.9)


@pytest.mark.parametrize("allocation", MEASURED_ALLOCATIONS)
def test_measured_allocations_need_data(allocation: str) -> None:
    with pytest.raises(ValueError, match=f"allocation '{allocation}' needs calibration data"):
        prune(model(), 0.5, allocation=allocation)


def test_refit_needs_data() -> None:
    with pytest.raises(ValueError, match="refit=True has no effect without data"):
        prune(model(), 0.5, refit=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sparsegpt", "seed": 3}, "seed=3 has no effect with method 'sparsegpt'"),
        ({"method": "wandar"}, "method 'wandar' is none of"),
        ({"swap": True, "pattern": "4x1"}, "swap=True exchanges single weights, and pattern 4x1 removes larger units"),
        ({"allocation": "owl", "max_sparsity": 0.4}, r"max_sparsity=0\.4 for each layer leaves no room"),
        ({"allocation": "error", "max_sparsity": 1.5}, "max_sparsity must be a fraction"),
    ],
)
def test_options_are_checked_before_the_data_is_read(options: dict, message: str) -> None:
    def data() -> Iterator[Tensor]:
        raise AssertionError("the data was read")
        yield X

    with pytest.raises(ValueError, match=message):
        prune(model(), 0.5, data=data(), **options)


def test_the_layer_whose_errors_cost_least_loses_most() -> None:
    net = model()
    with torch.no_grad():
        net[2].weight[:, 1:] *= 1e-4  # one input column says it all
    prune(net, 0.5, method="wanda", allocation="error", data=[X])
    sparsities = [layer.sparsity for layer in layers(net)]
    assert sparsities[1] == max(sparsities) > 0.6


def test_a_recipe_prunes_all_groups_in_one_calibration() -> None:
    recipe = Recipe(
        groups=[
            {"layers": ["2"], "method": "alps", "pattern": "2:4"},
            {"layers": ["0", "4"], "method": "wanda", "sparsity": 0.75, "refit": True},
        ]
    )
    net = apply(model(), recipe, data=iter([X]))
    assert [layer.sparsity for layer in layers(net)] == [0.75, 0.5, 0.75]
    first = prune(model(), 0.75, method="wanda", refit=True, include=["0"], data=[X])
    assert torch.equal(net[0].weight, first[0].weight)
    assert all(layer.pruning_result is not None for layer in layers(net))
    with pytest.raises(ValueError, match=r"groups\.0: method 'alps' needs calibration data"):
        apply(model(), recipe)
    with pytest.raises(ValueError, match=r"needs calibration data"):
        sparsify.Pruner(model(), recipe)


@pytest.mark.parametrize(
    "group",
    [
        {"sparsity": 0.5, "method": "wanda", "schedule": {"kind": "linear", "end": 4, "every": 1}},
        {"sparsity": 0.5, "refit": True, "schedule": {"kind": "linear", "end": 4, "every": 1}},
        {"sparsity": 0.5, "allocation": "owl", "schedule": {"kind": "linear", "end": 4, "every": 1}},
    ],
)
def test_data_is_not_for_schedules(group: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="needs calibration data, which is looked at once"):
        Recipe(groups=[group])


def test_a_plan_marks_what_the_data_decides() -> None:
    recipe = Recipe(groups=[{"sparsity": 0.5, "method": "sparsegpt", "allocation": "error"}])
    assert [(layer.ranked, layer.targets[-1][1]) for layer in plan(recipe, model())] == [(True, 0.5)] * 3


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_correcting_brings_the_outputs_nearer_to_the_dense_ones(method: str) -> None:
    x = weight((400, 16), seed=4) @ weight((16, 16), seed=5)
    wanted = model()(x).detach()
    plain, corrected = (prune(model(), 0.7, method=method, correct=c, data=[x[:200], x[200:]]) for c in (False, True))
    assert (corrected(x) - wanted).norm() < (plain(x) - wanted).norm()
    assert [layer.sparsity for layer in layers(corrected)] == [layer.sparsity for layer in layers(plain)]
    assert torch.equal(corrected[0].mask, plain[0].mask)  # nothing before it has changed


def test_aim_is_least_squares() -> None:
    x, dense, w = weight((50, 6), torch.float64), weight((50, 6), torch.float64, 1), weight((4, 6), torch.float64, 2)
    gram = Gram(6)
    gram.add(x[:20], dense[:20])
    gram.add(x[20:], dense[20:])
    root = (0.01 * gram.matrix.diagonal().mean()).sqrt() * torch.eye(6, dtype=torch.float64)
    inputs, outputs = torch.cat([x, root]), torch.cat([dense @ w.T, root @ w.T])
    torch.testing.assert_close(weight_for_dense_outputs(w, gram), torch.linalg.lstsq(inputs, outputs).solution.T)


def test_correcting_needs_weights_that_change() -> None:
    with pytest.raises(ValueError, match="correct=True has no effect with method 'wanda' unless refit=True"):
        prune(model(), 0.5, method="wanda", correct=True, data=[X])
    with pytest.raises(ValueError, match="correct=True has no effect without data"):
        prune(model(), 0.5, correct=True)
    assert prune(model(), 0.5, method="wanda", refit=True, correct=True, data=[X])[0].sparsity == 0.5


@pytest.mark.parametrize("correct", [False, True])
def test_pointwise_convolutions_are_the_linear_layers_of_their_pixels(correct: bool) -> None:
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    linears = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    for i in (0, 2):
        linears[i].weight, linears[i].bias = nn.Parameter(convolutions[i].weight[:, :, 0, 0].detach().clone()), None
        convolutions[i].bias = None
    images = torch.randn(4, 6, 5, 6)  # as wide as it has channels
    prune(convert(convolutions, types=nn.Conv2d), 0.5, method="sparsegpt", correct=correct, data=[images])
    prune(convert(linears), 0.5, method="sparsegpt", correct=correct, data=[images.permute(0, 2, 3, 1)])
    for i in (0, 2):
        torch.testing.assert_close(convolutions[i].weight[:, :, 0, 0], linears[i].weight)

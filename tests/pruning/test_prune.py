"""prune masks a converted model exactly, or not at all."""

import pytest
import torch
from cases import DTYPES, SPARSITIES, weight
from torch import Tensor, nn

import sparsify
from sparsify import SparseLinear, convert, prune
from sparsify.masking.allocation import ALLOCATIONS
from sparsify.masking.methods.registry import METHODS

X = weight((3, 8), seed=5)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4, bias=False)))


def layers(net: nn.Module) -> list[SparseLinear]:
    return [module for module in net.modules() if isinstance(module, SparseLinear)]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.filterwarnings("ignore::sparsify.RemovedLayerWarning")
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_number_of_zeros_is_exact(allocation: str, method: str, sparsity: float) -> None:
    net = model()
    assert prune(net, sparsity, method=method, allocation=allocation) is net
    zeros = [int((layer.weight == 0).sum()) for layer in layers(net)]
    if allocation == "uniform":
        assert zeros == [round(sparsity * 96), round(sparsity * 48)]
    else:
        assert sum(zeros) == round(sparsity * 144)
    for layer in layers(net):
        assert torch.equal(layer.mask, layer.weight != 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_any_precision(dtype: torch.dtype) -> None:
    net = prune(model().to(dtype), 0.75)
    assert [int((layer.weight == 0).sum()) for layer in layers(net)] == [72, 36]
    assert net(X.to(dtype)).dtype == dtype


def test_the_pruned_model_is_the_dense_one_with_zeros() -> None:
    net = prune(model(), 0.5)
    dense = model()
    with torch.no_grad():
        for layer, pruned in zip(layers(dense), layers(net), strict=True):
            layer.weight.mul_(pruned.mask)
    assert torch.equal(net(X), dense(X))


def test_global_may_empty_a_layer() -> None:
    net = model()
    with torch.no_grad():
        net[2].weight.mul_(1e-6)
    with pytest.warns(sparsify.RemovedLayerWarning, match="^2: all weights are removed"):
        prune(net, 0.5, allocation="global")
    assert [layer.sparsity for layer in layers(net)] == [24 / 96, 1.0]
    assert torch.isfinite(net(X)).all()


def test_a_higher_target_only_removes_and_sparsity_is_absolute() -> None:
    net = prune(model(), 0.5)
    before = [layer.mask.clone() for layer in layers(net)]
    prune(net, 0.75)
    for layer, old in zip(layers(net), before, strict=True):
        assert layer.sparsity == 0.75  # not 0.875
        assert not bool((layer.mask & ~old).any())
    after = state(net)
    prune(net, 0.75)
    assert all(torch.equal(after[name], tensor) for name, tensor in net.state_dict().items())


def test_chosen_layers_only() -> None:
    net = prune(model(), 0.5, include="0")
    assert [layer.sparsity for layer in layers(net)] == [0.5, 0]
    prune(net, 0.75, exclude=["0"])
    assert [layer.sparsity for layer in layers(net)] == [0.5, 0.75]


def test_an_allocation_dict() -> None:
    net = prune(model(), allocation={"0": 0.25, "*": 0.5})
    assert [layer.sparsity for layer in layers(net)] == [0.25, 0.5]


def test_patterns_reach_the_layers() -> None:
    assert prune(model(), pattern="2:4")[0].mask.reshape(-1, 4).sum(1).eq(2).all()
    assert set(prune(model(), 0.5, pattern="rows")[0].mask.sum(1).tolist()) == {0, 8}
    assert set(prune(model(), 0.5, pattern="4x1")[0].mask.reshape(3, 4, 8).sum(1).flatten().tolist()) == {0, 4}


def test_a_seed_gives_one_result() -> None:
    one, same, other = (prune(model(), 0.5, method="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one[0].mask, same[0].mask)
    assert not torch.equal(one[0].mask, other[0].mask)


def spoil(net: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    return net


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: spoil(model()), {"sparsity": 0.5}, r"2: the weight holds NaN or Inf; .*exclude=\['2'\]"),
        (lambda: spoil(model()), {"sparsity": 0.5, "allocation": "global"}, "2: the weight holds NaN"),
        (model, {"sparsity": 1.01}, "sparsity must be a fraction between 0 and 1, got 1.01"),
        (model, {"sparsity": -0.01}, "sparsity must be a fraction between 0 and 1, got -0.01"),
        (model, {"sparsity": 50}, "sparsity must be a fraction between 0 and 1, got 50"),
        (model, {}, "a sparsity is needed"),
        (model, {"pattern": "4:12"}, r"0: pattern 4:12 needs in_features divisible by 12, got 8; .*exclude=\['0'\]"),
        (model, {"sparsity": 0.5, "pattern": "12x1"}, "2: pattern 12x1 needs"),
        (model, {"sparsity": 0.5, "include": "fc1"}, "'fc1' matches no layer; near names: '0', '2'"),
        (model, {"sparsity": 0.5, "exclude": "1"}, "'1' matches no layer"),
        (model, {"sparsity": 0.5, "include": "0", "exclude": "0"}, "leave no layer"),
        (model, {"allocation": {"0": 0.5}}, "the allocation says nothing for '2'"),
        (model, {"sparsity": 0.5, "seed": 1}, "seed=1 has no effect"),
    ],
)
def test_an_error_changes_nothing(make, options: dict, message: str) -> None:  # type: ignore[no-untyped-def]
    net = make()
    before = state(net)
    with pytest.raises(ValueError, match=message):
        prune(net, **options)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_method_that_fails_changes_nothing() -> None:
    net = model()
    before = state(net)

    def fails_on_the_second(w: Tensor) -> Tensor:
        if w.shape == (4, 12):
            raise RuntimeError("no")
        return w.abs()

    with pytest.raises(RuntimeError, match="no"):
        prune(net, 0.5, method=fails_on_the_second)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_dense_model_is_not_pruned_silently() -> None:
    with pytest.raises(ValueError, match=r"the model has no SparseLinear; call sparsify\.convert\(model\) first"):
        prune(nn.Sequential(nn.Linear(4, 4)), 0.5)


def test_a_frozen_model_is_pruned_and_stays_frozen() -> None:
    net = prune(model().requires_grad_(False), 0.5)
    assert not any(p.requires_grad for p in net.parameters())
    assert int((net[0].weight == 0).sum()) == 48


def test_the_whole_flow() -> None:
    net = prune(model(), 0.75)
    fast = sparsify.export(net, format="csr")
    torch.testing.assert_close(fast(X), net(X))


@pytest.mark.parametrize("data", [None, [X]])
def test_a_weight_whose_entries_share_memory_is_refused(data: list[Tensor] | None) -> None:
    net = model()
    net[2].weight = nn.Parameter(torch.ones(4, 1).expand(4, 12))
    before = state(net)
    with pytest.raises(ValueError, match=r"^2: entries of the weight share memory .* of its own"):
        prune(net, 0.5, data=data)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())

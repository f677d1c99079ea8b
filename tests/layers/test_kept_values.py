"""Masked copies of weights and of gradients: those of torch.where, bit for bit, in less time."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sparsify
from sparsify.kernels.cpu import training
from sparsify.layers import masked_weight
from sparsify.layers.masked_weight import kept

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the fast path for few values too."""
    monkeypatch.setattr(masked_weight, "_FEWEST_COPIED", 0)


def values_and_mask(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(dtype)
    flat = values.view(-1)
    flat[::7], flat[3::11], flat[5::13] = float("nan"), float("-inf"), -0.0
    return values, torch.rand(shape, generator=generator) < 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (13, 17), (130, 131), (513, 520), (3, 5, 7, 9)])
def test_values_and_gradients_are_those_of_where(dtype: torch.dtype, shape: tuple[int, ...], any_size: None) -> None:
    values, mask = values_and_mask(*shape, dtype=dtype)
    gradient, _ = values_and_mask(*shape, dtype=dtype)
    results = []
    for function in (kept, lambda v, m: torch.where(m, v, 0.0)):
        leaf = values.clone().requires_grad_()
        result = function(leaf, mask)
        result.backward(gradient)
        results.append([result.detach(), leaf.grad])
    for found, expected in zip(*results, strict=True):
        assert found is not None
        assert expected is not None
        assert torch.equal(found.view(BITS[dtype.itemsize]), expected.view(BITS[dtype.itemsize]))
    untouched, _ = values_and_mask(*shape, dtype=dtype)
    assert torch.equal(values.view(BITS[dtype.itemsize]), untouched.view(BITS[dtype.itemsize]))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_kept(share: float, any_size: None) -> None:
    values = torch.randn(40, 50)
    assert torch.equal(kept(values, torch.full((40, 50), bool(share))), values * share)


def test_gradients_of_gradients(any_size: None) -> None:
    values = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 6) < 0.5
    assert torch.autograd.gradcheck(lambda v: kept(v, mask), values)
    assert torch.autograd.gradgradcheck(lambda v: kept(v, mask).pow(3), values)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # torch's own, too
@pytest.mark.parametrize("how", ["transposed values", "transposed mask", "vmap", "jvp", "compiled", "meta", "scripted"])
def test_other_ways_give_the_same(how: str, any_size: None) -> None:
    values, mask = torch.randn(6, 8), torch.rand(6, 8) < 0.5
    expected = values * mask
    if how == "transposed values":
        values = values.T.contiguous().T
        found = kept(values, mask)
    elif how == "transposed mask":
        found = kept(values, mask.T.contiguous().T)
    elif how == "vmap":
        found = torch.func.vmap(kept)(values, mask)
    elif how == "jvp":
        found = torch.func.jvp(lambda v: kept(v, mask), (torch.zeros(6, 8),), (values,))[1]
    elif how == "compiled":
        found = torch.compile(kept, backend="eager", fullgraph=True)(values, mask)
    elif how == "scripted":
        found = torch.jit.trace(lambda v: kept(v, mask), torch.zeros(6, 8))(values)
    else:
        assert kept(values.to("meta"), mask.to("meta")).is_meta
        return
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_gradient_that_has_gaps_is_masked(any_size: None) -> None:
    values, mask = torch.randn(6, 8, requires_grad=True), torch.rand(6, 8) < 0.5
    kept(values, mask).sum().backward()  # one value, expanded
    assert values.grad is not None
    assert torch.equal(values.grad, mask.float())


def test_a_training_is_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Of a layer with more weights than the fast path needs, in training mode."""
    model = sparsify.prune(sparsify.convert(torch.nn.Sequential(torch.nn.Linear(160, 160))), 0.5)
    other, x = copy.deepcopy(model), torch.randn(8, 160)
    for one, fewest in ((model, 0), (other, 1 << 40)):
        monkeypatch.setattr(masked_weight, "_FEWEST_COPIED", fewest)
        optimizer = torch.optim.Adam(one.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.skipif(not training.can_clear(torch.zeros(1), torch.ones(1, dtype=torch.bool)), reason="no native code")
def test_many_plain_values_are_copied_and_few_are_not() -> None:
    for n, name in ((1 << 14, "_KeptBackward"), ((1 << 14) - 1, "WhereBackward0")):
        result = kept(torch.ones(n, requires_grad=True), torch.ones(n, dtype=torch.bool))
        assert type(result.grad_fn).__name__ == name


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (13, 17), (130, 131)])
def test_another_dtype_is_that_of_a_cast_afterwards(
    shape: tuple[int, ...], straight_through: bool, to: torch.dtype, any_size: None
) -> None:
    values, mask = values_and_mask(*shape)
    gradient = torch.randn(shape).to(to)
    results = []
    for dtype in (to, None):
        leaf = values.clone().requires_grad_()
        used = masked_weight.masked_weight(
            leaf, mask, straight_through=straight_through, accumulator=None, dtype=dtype
        ).to(to)
        used.backward(gradient)
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        results.append([used.detach().view(BITS[2]), leaf.grad.view(BITS[4])])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed", "conv1d of transformers"])
@pytest.mark.parametrize("mode", ["zero", "trained"])
def test_a_layer_under_autocast_is_the_dense_layer_with_masked_values_zero(
    kind: str, mode: str, any_size: None
) -> None:
    torch.manual_seed(0)
    dense, x = {
        "linear": (nn.Linear(33, 17), torch.randn(5, 33)),
        "conv2d": (nn.Conv2d(6, 5, 3, padding=1), torch.randn(2, 6, 7, 9)),
        "transposed": (nn.ConvTranspose2d(6, 5, 3, stride=2), torch.randn(2, 6, 7, 9)),
        "conv1d of transformers": (Conv1D(17, 33), torch.randn(5, 33)),
    }[kind]
    plain = copy.deepcopy(dense)
    layer = sparsify.prune(sparsify.convert(nn.Sequential(dense), types=type(dense)), 0.6)[0]
    with torch.no_grad():
        plain.weight.mul_(layer.mask)
    if mode == "trained":
        layer.masked_mode = mode
        layer.weight.data.add_(layer.mask.logical_not() * 7.0)
    found = []
    for one in (layer, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        found.append((y.detach(), one.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    wanted = found[1][1] if mode == "trained" else found[1][1] * layer.mask
    assert torch.equal(found[0][1], wanted)


def test_products_under_autocast_take_the_cast_weight_and_tables_their_own(any_size: None) -> None:
    layer = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(9, 7))), 0.5)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.forward_weight(is_factor=True).dtype == torch.bfloat16
        assert layer.forward_weight().dtype == torch.float32
    assert layer.forward_weight(is_factor=True).dtype == torch.float32

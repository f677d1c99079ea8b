"""Pointwise convolutions: convert on request, prune, export to sparse layers that work on images as they lie."""

import copy

import pytest
import torch
from tested_kernels import needs_native
from torch import nn
from torch.nn import functional as F

import sparsify
from sparsify import CSRConv2d, LeftDenseWarning, SparseConv2d
from sparsify.inference import fusion
from sparsify.kernels import FORMS, PATTERNED, pointwise, supports

pytestmark = pytest.mark.usefixtures("one_thread")

RUNNING = [form for form in FORMS if form not in PATTERNED and supports(form, torch.device("cpu"), torch.float32)]

#: (channels, height, width): a usual image, one position (as after pooling), one channel, one row, odd.
IMAGES = [(24, 6, 10), (24, 1, 1), (1, 5, 5), (24, 1, 7), (37, 3, 3)]


def small(**options) -> nn.Module:
    """A block as in mobile networks, converted."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 24, 1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.Conv2d(24, 8, 1, bias=False),
    ).eval()
    return sparsify.convert(model, include=["0", "3"], types=nn.Conv2d, **options)


def dense_with_zeros(layer: SparseConv2d, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, layer.masked_weight(), layer.bias)


def test_convert_keeps_the_parameters_and_every_bit_of_the_outputs():
    conv = nn.Conv2d(6, 5, 1)
    model, x = nn.Sequential(conv), torch.randn(2, 6, 4, 4)
    weight, before = conv.weight, conv(x)
    sparsify.convert(model, types=nn.Conv2d)
    assert type(conv) is SparseConv2d
    assert conv.weight is weight
    assert conv.weight.shape == (5, 6, 1, 1)
    assert torch.equal(conv(x), before)
    assert repr(conv) == "SparseConv2d(6, 5, kernel_size=(1, 1), stride=(1, 1), sparsity=0)"


def test_a_few_convolutions_stay_dense_unless_asked_for():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 8))
    sparsify.convert(model)
    assert type(model[0]) is nn.Conv2d
    assert [row.name for row in sparsify.report(model)] == ["2"]
    sparsify.convert(model, types=[nn.Linear, nn.Conv2d])
    assert type(model[0]) is SparseConv2d
    assert [row.name for row in sparsify.report(model)] == ["0", "2"]


@pytest.mark.parametrize(
    ("options", "packs"),
    [
        ({"kernel_size": 1, "groups": 2}, False),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, False),
        ({"kernel_size": 3}, True),
        ({"kernel_size": 1, "padding": "valid"}, True),
        ({"kernel_size": 1, "padding": "same"}, True),
    ],
)
def test_what_has_no_kernel_is_exported_dense_and_says_why(options, packs):
    model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Conv2d(4, 4, **options)), types=nn.Conv2d), 0.5)
    fast = sparsify.export(model, format="csr")
    assert type(fast[0]) is (CSRConv2d if packs else nn.Conv2d)
    assert ("no sparse kernel" in sparsify.report(fast)[0].reason) != packs
    assert str(sparsify.to_dense(fast)[0]) == str(nn.Conv2d(4, 4, **options))


def test_a_subclass_stays_dense_and_says_why():
    conv = type("Mine", (nn.Conv2d,), {})(4, 4, 1)
    with pytest.warns(LeftDenseWarning, match=r"1 layer stays dense.* 1 \(it is a Mine"):
        sparsify.convert(nn.Sequential(nn.Conv2d(4, 4, 1), conv), types=nn.Conv2d)
    with pytest.raises(ValueError, match="a Mine"):
        sparsify.convert(nn.Sequential(conv), include="*", types=nn.Conv2d)


def test_a_mask_of_torch_prune_is_taken_over():
    conv = nn.Conv2d(8, 8, 1)
    nn.utils.prune.l1_unstructured(conv, "weight", 0.5)
    expected = conv.weight.detach().clone()
    sparsify.convert(conv, types=nn.Conv2d)
    assert conv.sparsity == 0.5
    assert torch.equal(conv.weight, expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1", "rows", "columns"])
def test_every_pattern_sees_a_matrix_of_channels(pattern):
    model = sparsify.prune(small(), None if pattern == "2:4" else 0.5, pattern=pattern)
    for layer in (model[0], model[3]):
        assert layer.mask.shape == layer.weight.shape
        assert layer.sparsity == 0.5
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2


def test_training_moves_no_masked_weight():
    model = sparsify.prune(small(), 0.75).train()
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    model(torch.randn(2, 16, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not model[0].weight[~model[0].mask].any()
    assert (model[0].weight != before).any()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("width", [4, 8])  # 8 is also the number of channels
def test_calibration_sees_one_row_for_each_position(method, width):
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(8, 6, 1))
    linear = nn.Sequential(nn.Linear(8, 6))
    linear[0].weight.data.copy_(conv[0].weight[:, :, 0, 0])
    linear[0].bias.data.copy_(conv[0].bias)
    images = [torch.randn(3, 8, 5, width) * torch.rand(8, 1, 1) for _ in range(2)]
    sparsify.prune(sparsify.convert(conv, types=nn.Conv2d), 0.5, method=method, data=images)
    rows = [x.permute(0, 2, 3, 1).contiguous() for x in images]
    sparsify.prune(sparsify.convert(linear), 0.5, method=method, data=rows)
    assert torch.equal(conv[0].mask[:, :, 0, 0], linear[0].mask)
    torch.testing.assert_close(conv[0].weight[:, :, 0, 0], linear[0].weight)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("form", RUNNING)
def test_an_exported_layer_computes_the_same_in_the_same_layout(form, image, memory_format):
    for n in (1, 3):
        layer = SparseConv2d(image[0], 40, 0.7, seed=1)
        fast = CSRConv2d.from_sparse(layer, form=form)
        x = torch.randn(n, *image).to(memory_format=memory_format)
        expected, y = dense_with_zeros(layer, x), fast(x)
        exact = dense_with_zeros(copy.deepcopy(layer).double(), x.double())
        slack = 8 * torch.finfo(torch.float32).eps * exact.abs().clamp(min=1)
        assert bool(((y - exact).abs() <= 2 * (expected - exact).abs().max() + slack).all())
        assert y.is_contiguous(memory_format=memory_format) or image[0] == 1  # with one channel, both are the same
        assert torch.equal(fast(x[0]), y[0]) or form == "csr"
        if form == "csr":
            assert torch.equal(y, expected)


def test_a_part_of_the_channels_is_read_where_it_lies():
    fast = CSRConv2d.from_sparse(SparseConv2d(8, 12, 0.5, seed=1), form=RUNNING[-1])
    wide = torch.randn(2, 20, 4, 4)
    torch.testing.assert_close(fast(wide[:, 3:11]), fast(wide[:, 3:11].contiguous()))
    assert fast(wide[:, 3:11]).is_contiguous()


@pytest.mark.parametrize("form", RUNNING)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_reach_input_and_bias(form, activation, memory_format):
    layer = SparseConv2d(8, 12, 0.5, seed=1)
    fast = CSRConv2d.from_sparse(layer, form=form)
    fast.activation = activation
    x = torch.randn(2, 8, 3, 5).to(memory_format=memory_format).requires_grad_()
    weights = torch.randn(2, 12, 3, 5)
    ours = torch.autograd.grad((fast(x) * weights).sum(), (x, fast.bias))
    dense = sparsify.kernels.ACTIVATIONS[activation](dense_with_zeros(layer, x))
    theirs = torch.autograd.grad((dense * weights).sum(), (x, layer.bias))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@needs_native
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_the_operator_keeps_torchs_rules():
    fast = CSRConv2d.from_sparse(SparseConv2d(8, 12, 0.5, seed=1), form="panel")
    for x in (torch.randn(2, 8, 3, 5), torch.randn(2, 8, 3, 5, requires_grad=True), torch.randn(0, 8, 3, 5)):
        torch.library.opcheck(torch.ops.sparsify.pointwise_packed.default, (x, *fast.tensors, fast.bias, 12, 8, 1))


def test_an_input_that_does_not_fit_is_an_error():
    fast = CSRConv2d.from_sparse(SparseConv2d(8, 12, 0.5, seed=1))
    for bad, message in (
        (torch.randn(2, 7, 3, 3), r"images of shape \(n, 8, height, width\), got \(2, 7, 3, 3\)"),
        (torch.randn(8, 3), "images of shape"),
        (torch.randn(2, 8, 3, 3, dtype=torch.float64), "float32, but the input is torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fast(bad)
    with pytest.raises(RuntimeError, match="the bias must be"):
        pointwise(torch.randn(1, 8, 2, 2), fast.tensors, "csr", (12, 8), torch.zeros(11))


@pytest.mark.parametrize("form", RUNNING)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compile_and_torch_export(form, memory_format):
    torch.compiler.reset()  # other tests may have compiled the layer's code up to the limit
    fast = sparsify.export(sparsify.prune(small(), 0.5), format=form)
    x = torch.randn(2, 16, 5, 5).to(memory_format=memory_format)
    expected = fast(x)
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), expected)


@pytest.mark.parametrize("form", RUNNING)
def test_copies_states_dtypes_and_files(form, tmp_path):
    model = sparsify.prune(small(), 0.5)
    fast, x = sparsify.export(model, format=form), torch.randn(2, 16, 5, 5)
    expected = fast(x)
    assert torch.equal(copy.deepcopy(fast)(x), expected)
    other = sparsify.export(sparsify.prune(small(), 0.9), format=form)
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), expected)
    other = copy.deepcopy(fast).double()
    assert other[0].form == "csr"
    assert torch.equal(other.float()(x), expected)
    assert other[0].form == form
    half = copy.deepcopy(fast).half()
    assert half[0].form == form
    torch.testing.assert_close(half(x.half()).float(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16

    sparsify.save(fast, tmp_path / "fast.safetensors")
    torch.manual_seed(1)
    fresh = nn.Sequential(*(type(m)(*a, **k) for m, a, k in _layers()))
    loaded = sparsify.load(tmp_path / "fast.safetensors", fresh)
    assert isinstance(loaded[0], CSRConv2d)
    torch.testing.assert_close(loaded(x), expected)
    sparsify.save(model, tmp_path / "masked.safetensors")
    loaded = sparsify.load(tmp_path / "masked.safetensors", nn.Sequential(*(type(m)(*a, **k) for m, a, k in _layers())))
    assert isinstance(loaded[0], SparseConv2d)
    assert torch.equal(loaded(x), model(x))


def _layers():
    conv = nn.Conv2d(1, 1, 1)
    return [
        (conv, (16, 24, 1), {}),
        (nn.ReLU(), (), {}),
        (conv, (24, 24, 3), {"padding": 1, "groups": 24}),
        (conv, (24, 8, 1), {"bias": False}),
    ]


def test_to_dense_gives_the_convolution_back():
    model, x = sparsify.prune(small(), 0.5), torch.randn(2, 16, 5, 5)
    expected = model(x)
    for converted in (sparsify.export(model, format="csr"), model):
        dense = sparsify.to_dense(converted)
        assert type(dense[0]) is nn.Conv2d
        assert repr(dense[0]) == "Conv2d(16, 24, kernel_size=(1, 1), stride=(1, 1))"
        assert dense[0].weight.shape == (24, 16, 1, 1)
        assert torch.equal(dense(x), expected)


def test_the_activation_that_follows_is_applied_by_the_layer(monkeypatch):
    monkeypatch.setattr(fusion, "FEWEST_FEATURES", 1)
    fast = sparsify.export(sparsify.prune(small(), 0.5), format=RUNNING[-1])
    assert fast[0].followed_by == "relu"


def test_looks_like_a_convolution():
    fast = CSRConv2d.from_sparse(SparseConv2d(8, 12, 0.5, seed=1))
    assert (fast.in_channels, fast.out_channels, fast.weight.shape) == (8, 12, (12, 8, 1, 1))
    assert repr(fast) == "CSRConv2d(in_features=8, out_features=12, bias=True, sparsity=0.5)"

"""Exported convolutions of any kernel: outputs, gradients, files and copies, and the BatchNorm after them."""

import copy

import pytest
import torch
from tested_kernels import needs_native
from torch import nn

import sparsify
from sparsify.layers import CSRConv1d, CSRConv2d, PackedLayer, csr_convolution
from sparsify.layers.sparse_convolution import SparseConv1d, SparseConv2d

pytestmark = pytest.mark.usefixtures("one_thread")

#: Options of torch's convolution, and whether kernels have them.
CONVOLUTIONS = [
    ({"kernel_size": 3, "padding": 1}, True),
    ({"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}, True),
    ({"kernel_size": 1, "stride": 2}, True),
    ({"kernel_size": 5, "dilation": 2, "padding": "same"}, True),
    ({"kernel_size": (1, 7), "padding": (0, 3)}, True),
    ({"kernel_size": 2, "padding": "same"}, False),  # one more zero on one side
    ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, False),
    ({"kernel_size": 3, "groups": 2}, False),
]


def pruned(kind, options, sparsity=0.75):
    torch.manual_seed(0)
    types = {"types": getattr(nn, kind)}
    model = sparsify.convert(nn.Sequential(getattr(nn, kind)(6, 12, **options)).eval(), **types)
    return sparsify.prune(model, sparsity)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize(("options", "packs"), CONVOLUTIONS)
@pytest.mark.parametrize("form", ["csr", pytest.param("panel", marks=needs_native)])
def test_outputs_and_gradients_are_those_of_the_masked_layer(options, packs, form, tmp_path):
    model = pruned("Conv2d", options)
    fast = sparsify.export(model, format=form)
    assert isinstance(fast[0], CSRConv2d if packs else nn.Conv2d)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 11, 9).to(memory_format=layout)
        wanted, found = model(x), fast(x)
        torch.testing.assert_close(found, wanted)
        assert found.is_contiguous(memory_format=layout)
        torch.testing.assert_close(fast(x[0]), wanted[0])
        grads = [torch.autograd.grad(m(y).square().sum(), y)[0] for m in (model, fast) for y in [x.requires_grad_()]]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
        x.requires_grad_(False)
    if packs:
        assert (fast[0].in_channels, fast[0].out_channels) == (6, 12)
        assert torch.equal(fast[0].weight, model[0].masked_weight())
    sparsify.save(fast, tmp_path / "fast.safetensors")
    for loaded in (
        copy.deepcopy(fast),
        sparsify.load(tmp_path / "fast.safetensors", nn.Sequential(nn.Conv2d(6, 12, **options)).eval()),
    ):
        assert isinstance(loaded[0], type(fast[0]))
        assert torch.equal(loaded(x), fast(x))
    assert torch.equal(sparsify.to_dense(fast)(x), wanted)


@pytest.mark.parametrize("options", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 4, "stride": 3, "dilation": 2}])
@pytest.mark.parametrize("form", ["csr", pytest.param("panel", marks=needs_native)])
def test_signals_are_images_of_one_row(options, form):
    model = pruned("Conv1d", options)
    fast, x = sparsify.export(model, format=form), torch.randn(2, 6, 40)
    assert isinstance(fast[0], CSRConv1d)
    torch.testing.assert_close(fast(x), model(x))
    torch.testing.assert_close(fast(x[0]), model(x)[0])
    assert fast[0].weight.shape == model[0].weight.shape
    assert type(sparsify.to_dense(fast)[0]) is nn.Conv1d


@needs_native
def test_compile_export_and_trace():
    torch.compiler.reset()
    fast = sparsify.export(pruned("Conv2d", {"kernel_size": 3, "padding": 1}), format="panel")
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 11, 9).to(memory_format=layout)
        expected = fast(x)
        torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(fast)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(fast[0])(x), expected)


@needs_native
def test_without_an_example_layers_are_measured_on_square_images():
    fast = sparsify.export(pruned("Conv2d", {"kernel_size": 3, "padding": 1}), tokens=100)
    assert set(fast[0].choice.times_us) == {"dense", "panel"}
    assert SparseConv2d(3, 4, 0, kernel_size=3, stride=2).input_shape(100) == (1, 3, 21, 21)
    assert SparseConv1d(3, 4, 0, kernel_size=3).input_shape(100) == (1, 3, 102)


@pytest.fixture
def _few_outputs_are_fused(monkeypatch):
    monkeypatch.setattr(csr_convolution, "FEWEST_NORMALIZED", 1)


class Residual(nn.Module):
    """A block as in ResNets: one activation module is used several times."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 16, 1), nn.BatchNorm2d(16, affine=False)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.bn3(self.conv3(self.relu(out)))


def residual():
    torch.manual_seed(0)
    block = Residual()
    for norm in (block.bn1, block.bn2, block.bn3):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return sparsify.prune(sparsify.convert(block.eval(), types=nn.Conv2d), 0.7)


@pytest.mark.usefixtures("_few_outputs_are_fused")
@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_batchnorms_are_applied_by_the_layer_before_them(layout, mode, monkeypatch):
    model = residual()
    fast, plain = sparsify.export(model, format="panel"), sparsify.export(model, format="panel", fuse=False)
    names = ("conv1", "conv2", "conv3")
    assert [getattr(fast, name).followed_by for name in names] == ["batch_norm"] * 3
    assert [getattr(plain, name).followed_by for name in names] == ["none"] * 3
    assert list(fast.state_dict()) == list(plain.state_dict())
    scaled = []
    convolve = CSRConv2d._convolve
    monkeypatch.setattr(
        CSRConv2d, "_convolve", lambda *args: scaled.append((args[3], len(args) > 4)) or convolve(*args)
    )
    x = torch.randn(2, 16, 12, 13).to(memory_format=layout)
    with mode():
        found, wanted = fast(x), model(x)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
        assert torch.equal(fast(x), found)
        assert scaled[:3] == (
            [("none", False)] * 3 if mode is torch.enable_grad else [("relu", True), ("none", True), ("none", True)]
        )
        torch.testing.assert_close(plain(x), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("_few_outputs_are_fused")
@needs_native
def test_a_batchnorm_that_changes_or_looks_at_its_input_is_respected():
    model = residual()
    fast, x = sparsify.export(model, format="panel"), torch.randn(2, 16, 12, 13)
    for norm in (model.bn1, fast.bn1):  # numbers of a BatchNorm may change after the export
        norm.running_mean.fill_(3)
        norm.eps = 0.5
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=2e-5)
        for block in (model, fast):
            block.bn1.train()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast.bn1.running_mean, model.bn1.running_mean)
        seen = []
        fast.bn2.register_forward_hook(lambda module, args, output: seen.append(output + 0))
        fast(x)
    assert seen[0].shape == (2, 16, 12, 13)


@pytest.mark.usefixtures("_few_outputs_are_fused")
@needs_native
def test_a_small_resnet_of_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is missing: pip install torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=5).eval()
    masked = sparsify.prune(sparsify.convert(model, types=nn.Conv2d), 0.8)
    fast, x = sparsify.export(masked, format="panel"), torch.randn(1, 3, 64, 64)
    layers = [layer for layer in fast.modules() if isinstance(layer, PackedLayer)]
    assert len(layers) == 20
    assert all(layer.followed_by == "batch_norm" for layer in layers)
    with torch.no_grad():
        wanted = masked(x)
        torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))

"""Exported convolutions of any kernel: outputs, gradients, files and copies."""

import copy

import pytest
import torch
from tested_kernels import needs_native
from torch import nn

import sparsify
from sparsify.layers import CSRConv1d, CSRConv2d
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

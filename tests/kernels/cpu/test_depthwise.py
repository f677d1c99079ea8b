"""depthwise: every kernel and dtype against float64, in both layouts, and nothing outside of images is touched."""

import itertools

import pytest
import torch
from table import ACTIVATIONS, DTYPES, before_a_guard_page, rounding_error
from torch import Tensor
from torch.nn import functional as F

from sparsify.kernels.cpu import library as native
from sparsify.kernels.cpu.convolution import convolution
from sparsify.kernels.geometry import Geometry, Norm

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
LAYOUTS = (torch.contiguous_format, torch.channels_last)

#: Those with a path of their own: 3, 5 and 7 columns. Then one row; a stride of 3; dilation; padding past the image.
GEOMETRIES = [
    Geometry((3, 3), (1, 1), (1, 1)),
    Geometry((3, 3), (2, 2), (1, 1)),
    Geometry((5, 5), (1, 1), (2, 2)),
    Geometry((5, 5), (2, 2), (2, 2)),
    Geometry((7, 7), (1, 1), (3, 3)),
    Geometry((1, 3), (1, 1), (0, 1)),
    Geometry((2, 4), (3, 3), (0, 2)),
    Geometry((3, 3), (1, 2), (2, 2), (2, 3)),
    Geometry((3, 3), (1, 1), (9, 8)),
]
#: (images, channels, height, width): one value; part of a block; several tiles, blocks and groups; maps of odd sizes.
CASES = [(1, 2, 1, 1), (2, 3, 9, 7), (1, 17, 7, 15), (3, 16, 6, 4), (1, 100, 14, 14), (1, 33, 30, 5), (2, 70, 8, 23)]


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def exact(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    return F.conv2d(x, kernels, None, *geometry[1:], groups=x.shape[1])


def column(vector: Tensor) -> Tensor:
    return vector.double()[:, None, None]


@every_dtype
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_depthwise_over_the_table(kernel, dtype, geometry):
    activations, biases, layouts, norms = (
        itertools.cycle(c) for c in (ACTIVATIONS, (True, True, False), LAYOUTS, (False, True, False, False, True))
    )
    n_cases = 0
    for i, (n, channels, height, width) in enumerate(CASES * 2):
        size = (n, channels, *geometry.output_size(height, width))
        activation, with_bias, layout, with_norm = next(activations), next(biases), next(layouts), next(norms)
        if min(size) < 1:
            continue
        x = before_a_guard_page(randn(n, channels, height, width, seed=i).to(dtype).contiguous())
        if layout == torch.channels_last:
            x = before_a_guard_page(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        kernels = before_a_guard_page(randn(channels, 1, *geometry.kernel, seed=i + 1).to(dtype))
        bias = before_a_guard_page(randn(channels, seed=i + 2).to(dtype)) if with_bias else None
        norm = Norm(*randn(2, channels, seed=i + 3).square(), *randn(2, channels, seed=i + 4), 1e-3)
        norm = norm if with_norm and dtype == torch.float32 else None
        y = torch.full(size, float("nan"), dtype=dtype).contiguous(memory_format=layout)
        number = native.ACTIVATIONS[activation]
        assert convolution(x, None, kernels, bias, channels, geometry, number, out=y, norm=norm) is y
        sums = exact(x.double(), kernels.double(), geometry)
        sizes = exact(x.double().abs(), kernels.double().abs(), geometry)
        sums = sums + (0 if bias is None else column(bias))
        sizes = sizes + (0 if bias is None else column(bias).abs())
        if norm is not None:
            scale = column(norm.weight) / (column(norm.variance) + norm.eps).sqrt()
            sums = (sums - column(norm.mean)) * scale + column(norm.bias)
            sizes = (sizes + column(norm.mean).abs()) * scale.abs() + column(norm.bias).abs()
        wanted = ACTIVATIONS[activation](sums)
        # A chain of n additions is off by at most n units of 2^-24 of the sum of sizes (Higham, section 3.1), a norm
        # rounds 9 times; an activation has a slope of at most 1.5 and 4 units of its own; the output is rounded once.
        n_roundings = geometry.kernel[0] * geometry.kernel[1] + 9 + 4
        allowed = 1.5 * n_roundings * 2**-24 * sizes + rounding_error(wanted, dtype)
        error = (y.double() - wanted).abs()
        assert bool((error <= allowed).all()), f"{size}: error {error.max():.3g}, allowed {allowed.max():.3g}"
        n_cases += 1
    assert n_cases >= 8


@every_dtype
@pytest.mark.parametrize("geometry", GEOMETRIES[:5])
def test_layouts_strides_threads_and_company_change_no_bit(kernel, dtype, geometry):
    x = randn(3, 70, 20, 23, seed=1).to(dtype)
    kernels, bias = randn(70, 1, *geometry.kernel, seed=2).to(dtype), randn(70, seed=3).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = convolution(x, None, kernels, bias, 70, geometry)
        torch.set_num_threads(3)
        assert torch.equal(convolution(x, None, kernels, bias, 70, geometry), first)
        last = convolution(x.contiguous(memory_format=torch.channels_last), None, kernels, bias, 70, geometry)
    finally:
        torch.set_num_threads(threads)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, first)
    wide = torch.full((3, 75, 22, 30), float("nan"), dtype=dtype)
    wide[:, 3:73, 1:21, 5:28] = x
    assert torch.equal(convolution(wide[:, 3:73, 1:21, 5:28], None, kernels, bias, 70, geometry), first)
    assert torch.equal(convolution(x[1:2], None, kernels, bias, 70, geometry), first[1:2])
    other = convolution(x, None, kernels, bias, 70, geometry, out=torch.empty_like(last))
    assert torch.equal(other, first), "a layout of the result's own"


def test_nan_and_infinity_reach_their_own_channel_alone(kernel):
    x = randn(1, 20, 9, 9, seed=1)
    x[0, 3, 4, 4], x[0, 7, 0, 0] = float("nan"), float("inf")
    kernels = torch.ones(20, 1, 3, 3)
    y = convolution(x, None, kernels, None, 20, GEOMETRIES[0])
    assert bool(y[0, 3, 3:6, 3:6].isnan().all())
    assert int(y.isnan().sum()) == 9
    assert bool(y[0, 7, :2, :2].isinf().all())
    assert int(y.isinf().sum()) == 4


@pytest.mark.parametrize("wrong", ["scale", "residual", "out"])
def test_what_the_kernel_has_not_is_an_error(kernel, wrong):
    x, kernels = randn(1, 4, 5, 5, seed=1), randn(4, 1, 3, 3, seed=2)
    given = {"scale": {"scale": torch.ones(4)}, "residual": {"residual": x}, "out": {}}[wrong]
    with pytest.raises(ValueError, match="argument out of range"):
        convolution(x, None, kernels, None, 3 if wrong == "out" else 4, GEOMETRIES[0], **given)

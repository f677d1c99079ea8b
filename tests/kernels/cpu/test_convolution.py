"""convolution: every kernel and dtype against float64, in both layouts, and nothing outside of images is touched."""

import itertools

import pytest
import torch
from table import (
    ACTIVATIONS,
    DTYPES,
    SPARSITIES,
    before_a_guard_page,
    exact_and_allowed_error,
    pack,
    packed_random_weight,
    random_weight,
)
from torch import Tensor
from torch.nn import functional as F

from sparsify.kernels.cpu import library as native
from sparsify.kernels.cpu.convolution import convolution
from sparsify.kernels.geometry import Geometry, Norm

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
LAYOUTS = (torch.contiguous_format, torch.channels_last)

#: Usual kernels; one position with a stride; one row; even, with a stride over nothing; padding wider than the kernel.
GEOMETRIES = [
    Geometry((3, 3), (1, 1), (1, 1)),
    Geometry((3, 3), (2, 2), (1, 1)),
    Geometry((1, 1), (2, 2)),
    Geometry((1, 1)),
    Geometry((7, 7), (2, 2), (3, 3)),
    Geometry((1, 7), (1, 1), (0, 3)),
    Geometry((2, 2), (3, 3)),
    Geometry((3, 2), (1, 3), (2, 2), (2, 3)),
    Geometry((5, 5), (2, 1), (6, 4), (1, 2)),
]
#: (images, channels, height, width, out): one value, one channel, odd maps that share vectors, several tiles, blocks.
CASES = [
    (1, 1, 1, 1, 1),
    (2, 3, 9, 7, 5),
    (3, 17, 7, 7, 33),
    (1, 8, 13, 21, 16),
    (5, 24, 3, 4, 140),
    (1, 40, 14, 14, 20),
    (2, 1, 30, 5, 3),
]


def as_rows(images: Tensor) -> Tensor:
    """(n, channels, height, width) -> (tokens, channels)."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def unfolded(x: Tensor, geometry: Geometry) -> Tensor:
    """The inputs of each output position, (tokens, channels * kernel)."""
    windows = F.unfold(x, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride)
    return windows.transpose(1, 2).flatten(0, 1)


def fitting() -> list[tuple[Geometry, tuple[int, ...]]]:
    """Every geometry with every case whose images are large enough."""
    pairs = itertools.product(GEOMETRIES, CASES)
    return [(g, case) for g, case in pairs if min(g.output_size(*case[2:4])) > 0]


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def norms(out: int, seed: int) -> Norm:
    """A BatchNorm after a convolution."""
    return Norm(randn(out, seed=seed), randn(out, seed=seed + 1).square(), *randn(2, out, seed=seed + 2), 1e-3)


def ended(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The result in float64 with a norm and a residual of (tokens, out), and how far from it a kernel may be."""
    exact, allowed = exact_and_allowed_error(rows, weight, bias, activation)
    if norm is None and residual is None:
        return exact, allowed
    mean, variance, factor, shift = (
        (v.double() for v in norm[:4]) if norm else (torch.zeros(()), *torch.ones(2, 1), torch.zeros(()))
    )
    scale = factor / (variance + (norm.eps if norm else 0)).sqrt()
    offset, added = (
        torch.zeros(()) if bias is None else bias.double(),
        0 if residual is None else as_rows(residual).double(),
    )
    sums = rows.double() @ weight.double().T
    exact = ACTIVATIONS[activation]((sums + offset - mean) * scale + shift + added)
    # Sums of n terms in blocks, then at most 9 operations, each rounded once; an activation is at most 1.5 times as
    # steep as its input.
    size = (rows.double().abs() @ weight.double().abs().T + offset.abs() + mean.abs()) * scale.abs() + shift.abs()
    size = size + (0 if residual is None else added.abs())
    n_roundings = rows.shape[1] ** 0.5 + 9
    rounded = torch.finfo(weight.dtype).eps * exact.abs()
    return exact, 1.5 * torch.finfo(torch.float32).eps * n_roundings * size + rounded


@every_dtype
def test_convolution_over_the_table(kernel, dtype):
    sparsities, activations, biases, layouts, endings = (
        itertools.cycle(c) for c in (SPARSITIES, ACTIVATIONS, (True, True, False), LAYOUTS, range(5))
    )
    pairs = fitting()
    for i, (geometry, (n, channels, height, width, out)) in enumerate(pairs):
        shape, activation = (out, channels * geometry.kernel[0] * geometry.kernel[1]), next(activations)
        sparsity, layout, ending = next(sparsities), next(layouts), next(endings)
        x = randn(n, channels, height, width, seed=i).to(dtype=dtype, memory_format=layout)
        bias = randn(out, seed=i).to(dtype) if next(biases) else None
        packed = packed_random_weight("panel", shape, sparsity, dtype)
        y = torch.full((n, out, *geometry.output_size(height, width)), float("nan"), dtype=dtype)
        y = y.contiguous(memory_format=layout)
        norm = norms(out, i) if ending in (1, 2) and dtype == torch.float32 else None
        residual = randn(*y.shape, seed=i).to(dtype).contiguous(memory_format=layout) if ending in (2, 3) else None
        number = native.ACTIVATIONS[activation]
        assert convolution(x, *packed, bias, out, geometry, number, out=y, norm=norm, residual=residual) is y
        weight = random_weight(shape, sparsity)[0].to(dtype)
        exact, allowed = ended(unfolded(x, geometry), weight, bias, norm, residual, activation)
        error = (as_rows(y).double() - exact).abs()
        assert bool((error <= allowed).all()), f"{geometry}: error {error.max():.3g}, allowed {allowed.max():.3g}"
    assert len(pairs) > 40


def test_a_norm_may_lack_numbers_and_a_residual_lie_otherwise(kernel):
    geometry, out, dtype = GEOMETRIES[0], 20, torch.float32
    packed = packed_random_weight("panel", (out, 45), 0.5, dtype)
    x, norm = randn(2, 5, 7, 6, seed=1), norms(out, 2)
    plain, residual = convolution(x, *packed, None, out, geometry), randn(2, out, 7, 6, seed=3)
    with_gaps = Norm(*(torch.stack([v, v], 1)[:, 0] for v in norm[:4]), eps=0.1)
    for used in (Norm(norm.mean, norm.variance, None, None, 0.1), with_gaps):
        wanted = F.batch_norm(plain, *used[:4], eps=used.eps) + residual
        for other in (residual, residual.contiguous(memory_format=torch.channels_last)):
            found = convolution(x, *packed, None, out, geometry, norm=used, residual=other)
            torch.testing.assert_close(found, wanted)


@every_dtype
def test_a_position_does_not_depend_on_its_company_nor_on_layout_nor_on_threads(kernel, dtype):
    for (geometry, size), sparsity in itertools.product(
        (
            (GEOMETRIES[0], (3, 30, 9, 15)),
            (GEOMETRIES[1], (3, 30, 17, 15)),
            (GEOMETRIES[0], (2, 3, 40, 40)),
            (GEOMETRIES[3], (3, 30, 7, 7)),
        ),
        (0.5, 0.9),
    ):
        shape = (300, size[1] * geometry.kernel[0] * geometry.kernel[1])
        packed = packed_random_weight("panel", shape, sparsity, dtype)
        x = randn(*size, seed=2).to(dtype)
        together = convolution(x, *packed, None, shape[0], geometry)
        assert together.is_contiguous()
        assert torch.equal(as_rows(together), native.linear("panel", unfolded(x, geometry), *packed, None, shape))
        assert torch.equal(convolution(x[1:2], *packed, None, shape[0], geometry), together[1:2])
        wide = torch.zeros(size[0], size[1] + 2, size[2] + 1, size[3], dtype=dtype)
        wide[:, 1:-1, 1:] = x
        assert torch.equal(convolution(wide[:, 1:-1, 1:], *packed, None, shape[0], geometry), together)
        last = x.contiguous(memory_format=torch.channels_last)
        from_last = convolution(last, *packed, None, shape[0], geometry)
        assert from_last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(from_last, together)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                for images in (x, last):
                    assert torch.equal(convolution(images, *packed, None, shape[0], geometry), together)
        finally:
            torch.set_num_threads(before)


@every_dtype
def test_inf_and_nan_reach_only_the_outputs_that_keep_them(kernel, dtype):
    geometry, out, channels = GEOMETRIES[1], 20, 9
    mask = random_weight((out, channels * 9), 0.75)[1]
    packed = packed_random_weight("panel", mask.shape, 0.75, dtype)
    x = randn(2, channels, 8, 6, seed=3).to(dtype)
    clean = convolution(x, *packed, None, out, geometry)
    for bad, channel in itertools.product((float("inf"), float("nan")), range(channels)):
        dirty, marked = x.clone(), torch.zeros_like(x, dtype=torch.float64)
        dirty[1, channel, 5, 4], marked[1, channel, 5, 4] = bad, 1
        y = convolution(dirty, *packed, None, out, geometry)
        reached = F.conv2d(marked, mask.double().view(out, channels, 3, 3), None, *geometry[1:]) > 0
        assert not bool(y[reached].isfinite().any())
        assert torch.equal(y[~reached], clean[~reached])
        assert bool(reached.any())


@every_dtype
def test_nothing_in_or_out(kernel, dtype):
    geometry = GEOMETRIES[0]
    for out, channels, n in ((3, 0, 2), (0, 3, 1), (3, 4, 0)):
        shape = (out, channels * 9)
        packed = pack("panel", torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=torch.bool))
        x, bias = torch.zeros(n, channels, 4, 5, dtype=dtype), torch.ones(out, dtype=dtype)
        y = convolution(x, *packed, bias, out, geometry)
        assert y.shape == (n, out, 4, 5)
        assert bool((y == 1).all())


@every_dtype
def test_nothing_past_the_end_is_read_or_written(kernel, dtype):
    for i, (geometry, (n, channels, height, width, out)) in enumerate(fitting()):
        shape, layout = (out, channels * geometry.kernel[0] * geometry.kernel[1]), LAYOUTS[i % 2]
        packed = tuple(before_a_guard_page(part) for part in packed_random_weight("panel", shape, 0.7, dtype))
        bias, norm = before_a_guard_page(randn(out, seed=1).to(dtype)), None
        if dtype == torch.float32:
            norm = Norm(*(before_a_guard_page(torch.ones(out)) for _ in range(4)), eps=0.0)
        size = n, out, *geometry.output_size(height, width)
        sizes = (n, channels, height, width), size
        if layout is torch.channels_last:
            sizes = tuple((a, c, d, b) for a, b, c, d in sizes)
        x, y, residual = (before_a_guard_page(torch.full(s, 0.5, dtype=dtype)) for s in (*sizes, sizes[1]))
        y.fill_(float("nan"))
        if layout is torch.channels_last:
            x, y, residual = (t.permute(0, 3, 1, 2) for t in (x, y, residual))
        convolution(x, *packed, bias, out, geometry, out=y, norm=norm, residual=residual)
        assert bool(y.isfinite().all())


@every_dtype
def test_rows_of_many_positions_with_a_stride_of_two(kernel, dtype):
    """Vectors of every other value, of rows that end with an image, a page, or a few values later."""
    out = 5
    for width, padding in itertools.product((15, 16, 17, 31, 32, 33, 34, 35, 63, 64, 65, 66, 97), (0, 1)):
        geometry, shape = Geometry((3, 3), (2, 2), (padding, padding)), (out, 27)
        packed = packed_random_weight("panel", shape, 0.5, dtype)
        x = before_a_guard_page(randn(1, 3, 5, width, seed=width).to(dtype))
        y = convolution(x, *packed, None, out, geometry)
        exact, allowed = exact_and_allowed_error(
            unfolded(x, geometry), random_weight(shape, 0.5)[0].to(dtype), None, None
        )
        assert bool(((as_rows(y).double() - exact).abs() <= allowed).all()), (width, padding)

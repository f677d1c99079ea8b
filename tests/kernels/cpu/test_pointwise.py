"""pointwise: every kernel and dtype against float64 on images, channels first, and nothing outside them is touched."""

import itertools

import pytest
import torch
from table import (
    ACTIVATIONS,
    DTYPES,
    SHAPES,
    SPARSITIES,
    before_a_guard_page,
    exact_and_allowed_error,
    pack,
    packed_random_weight,
    random_weight,
)
from torch import Tensor

from sparsify.kernels.cpu import library as native

FORM = "panel"  # whose code pointwise is: tests/conftest.py
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

#: (images, height, width): one position, odd planes, around a vector (16) and a tile (64) of tokens, several tiles.
PLANES = [(1, 1, 1), (2, 7, 7), (3, 1, 5), (1, 4, 4), (2, 3, 21), (1, 8, 8), (1, 5, 13), (5, 3, 3), (1, 10, 20)]


def as_rows(images: Tensor) -> Tensor:
    """(n, channels, height, width) -> (tokens, channels)."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)


@every_dtype
def test_pointwise_over_the_table(kernel, dtype):
    """Inputs and outputs are channels in the middle of wider images, of which nothing else changes."""
    planes, activations, biases = (itertools.cycle(c) for c in (PLANES, ACTIVATIONS, (True, True, False)))
    n_cases, seen = 0, set()
    for shape, sparsity in itertools.product(SHAPES, SPARSITIES):
        (n, height, width), activation, with_bias = next(planes), next(activations), next(biases)
        out, in_ = shape
        weight = random_weight(shape, sparsity)[0].to(dtype)
        generator = torch.Generator().manual_seed(n_cases)
        x = torch.randn(n, in_ + 3, height, width, generator=generator).to(dtype)[:, 1 : in_ + 1]
        bias = torch.randn(out, generator=generator).to(dtype) if with_bias else None
        wide = torch.full((n, out + 2, height, width), float("nan"), dtype=dtype)
        packed = packed_random_weight("panel", shape, sparsity, dtype)
        native.pointwise(x, *packed, bias, shape, native.ACTIVATIONS[activation], out=wide[:, 1 : out + 1])
        exact, allowed = exact_and_allowed_error(as_rows(x), weight, bias, activation)
        error = (as_rows(wide[:, 1 : out + 1]).double() - exact).abs()
        assert bool((error <= allowed).all()), f"error {error.max():.3g}, allowed {allowed.max():.3g}"
        assert bool(wide[:, 0].isnan().all())
        assert bool(wide[:, out + 1].isnan().all()), "wrote beside the output"
        seen.add((n, height, width))
        n_cases += 1
    assert n_cases == len(SHAPES) * len(SPARSITIES)
    assert seen == set(PLANES)


@every_dtype
def test_a_position_does_not_depend_on_its_company_nor_on_layout_nor_on_threads(kernel, dtype):
    for shape, sparsity in itertools.product(((70, 90), (256, 512)), (0.5, 0.9)):
        packed = packed_random_weight("panel", shape, sparsity, dtype)
        x = torch.randn(3, shape[1], 9, 15, generator=torch.Generator().manual_seed(2)).to(dtype)
        together = native.pointwise(x, *packed, None, shape)
        assert torch.equal(as_rows(together), native.linear("panel", as_rows(x), *packed, None, shape))
        assert torch.equal(native.pointwise(x[1:2], *packed, None, shape), together[1:2])
        assert torch.equal(native.pointwise(x[:, :, 2:5, 3:], *packed, None, shape), together[:, :, 2:5, 3:])
        assert torch.equal(native.pointwise(x.mT, *packed, None, shape), together.mT)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(native.pointwise(last, *packed, None, shape), together)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                assert torch.equal(native.pointwise(x, *packed, None, shape), together)
        finally:
            torch.set_num_threads(before)


@every_dtype
def test_inf_and_nan_reach_only_the_outputs_that_keep_their_channel(kernel, dtype):
    shape, n_masked = (64, 130), 0
    for sparsity, bad in itertools.product((0.3, 0.75, 0.95), (float("inf"), float("nan"))):
        mask = random_weight(shape, sparsity)[1]
        packed = packed_random_weight("panel", shape, sparsity, dtype)
        x = torch.randn(2, 130, 3, 7, generator=torch.Generator().manual_seed(3)).to(dtype)
        clean = native.pointwise(x, *packed, None, shape)
        for channel in range(0, 130, 9):
            dirty = x.clone()
            dirty[1, channel, 2, 6] = bad
            y = native.pointwise(dirty, *packed, None, shape)
            reached = torch.zeros_like(y, dtype=torch.bool)
            reached[1, mask[:, channel], 2, 6] = True
            assert not bool(y[reached].isfinite().any())
            assert torch.equal(y[~reached], clean[~reached])
            n_masked += int((~mask[:, channel]).sum())
    assert n_masked > 0


@every_dtype
def test_nothing_in_or_out_or_no_position(kernel, dtype):
    for out, in_, plane in (
        (3, 0, (2, 2, 2)),
        (0, 3, (1, 2, 2)),
        (0, 0, (1, 1, 1)),
        (3, 4, (0, 2, 2)),
        (3, 4, (2, 0, 2)),
    ):
        packed = pack("panel", torch.zeros(out, in_, dtype=dtype), torch.zeros(out, in_, dtype=torch.bool))
        x, bias = torch.zeros(plane[0], in_, *plane[1:], dtype=dtype), torch.ones(out, dtype=dtype)
        y = native.pointwise(x, *packed, bias, (out, in_))
        assert y.shape == (plane[0], out, *plane[1:])
        assert bool((y == 1).all())


@every_dtype
def test_nothing_past_the_end_is_read(kernel, dtype):
    for shape, sparsity in itertools.product(((1, 1), (5, 37), (70, 96), (33, 1003)), (0.0, 0.4, 0.9, 1.0)):
        weight, mask = random_weight(shape, sparsity)
        packed = tuple(before_a_guard_page(part) for part in pack("panel", weight.to(dtype), mask))
        bias = before_a_guard_page(torch.randn(shape[0]).to(dtype))
        for n, height, width in PLANES:
            x = before_a_guard_page(torch.randn(n, shape[1], height, width).to(dtype))
            y = before_a_guard_page(torch.full((n, shape[0], height, width), float("nan"), dtype=dtype))
            native.pointwise(x, *packed, bias, shape, out=y)
            assert bool(y.isfinite().all())

"""Triton kernels of the form "narrow": a few tokens, and expansion to dense.

A program takes a row. Its tile is (steps, windows, lanes): the lanes of a window walk over its kept weights together,
step by step. Neighbouring lanes read neighbouring weights and inputs, and the facts of a window are loaded once for
all steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify.kernels.gpu.triton.epilogue import activate
from sparsify.kernels.gpu.triton.sections import load_starts


@triton.jit
def _ends(index, row, window, n_windows, starts_at, IS_WIDE: tl.constexpr):
    """Return the beginnings and ends of the values of these windows of a row; both are equal past the last window."""
    at = row * (n_windows + 1) + window
    inside = window < n_windows
    row_start = tl.load(index.to(tl.pointer_type(tl.int32)) + row)
    begin = load_starts(index, starts_at, at, inside, IS_WIDE)
    end = load_starts(index, starts_at, at + 1, inside, IS_WIDE)
    return row_start + begin, row_start + end


@triton.jit
def _slots(index, values, begin, end, done, columns_at, STEPS: tl.constexpr, LANES: tl.constexpr):
    """Return (steps, windows, lanes): the next values, their columns within the window, and a mask of real ones."""
    first = begin[:, None] + (done + tl.arange(0, LANES))[None, :]
    step = tl.arange(0, STEPS)[:, None, None] * LANES
    kept = first[None, :, :] + step < end[None, :, None]
    # The step is added to the address, not to the number: it ends up in the instruction.
    weights = tl.load((values + first)[None, :, :] + step, mask=kept, other=0.0)
    column = tl.load((index + columns_at + first)[None, :, :] + step, mask=kept, other=0)
    return weights, column.to(tl.int32), kept


@triton.jit(do_not_specialize=["tokens"])
def few(
    x,
    index,
    values,
    bias,
    y,
    tokens,
    x_stride,
    first_row,
    out,
    n_windows,
    starts_at,
    columns_at,
    TOKENS: tl.constexpr,
    WINDOWS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    IS_WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Multiply TOKENS rows of x (tokens, inner) at a time by one row of the weight, from `first_row` on."""
    row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    x_rows = x + token.to(tl.int64)[:, None, None, None] * x_stride
    total = tl.zeros([TOKENS, STEPS, WINDOWS, LANES], tl.float32)
    for first in range(0, n_windows, WINDOWS):
        window = first + tl.arange(0, WINDOWS)
        begin, end = _ends(index, first_row + row, window, n_windows, starts_at, IS_WIDE)
        for done in range(0, tl.max(end - begin), STEPS * LANES):
            weights, column, kept = _slots(index, values, begin, end, done, columns_at, STEPS, LANES)
            asked = kept[None, :, :, :] & (token < tokens)[:, None, None, None]
            from_column = x_rows + (window * 256)[None, None, :, None]
            inputs = tl.load(from_column + column[None, :, :, :], mask=asked, other=0.0)
            total += weights.to(tl.float32)[None, :, :, :] * inputs.to(tl.float32)
    result = tl.sum(tl.sum(tl.sum(total, 1), 1), 1)
    if HAS_BIAS:
        result += tl.load(bias + row).to(tl.float32)
    tl.store(y + token * out + row, activate(result, ACTIVATION).to(y.dtype.element_ty), mask=token < tokens)


@triton.jit
def dense(
    index,
    values,
    y,
    first_row,
    inner,
    n_windows,
    starts_at,
    columns_at,
    WINDOWS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    """Write the kept weights of one row into a dense weight (out, inner) of zeros."""
    row = tl.program_id(0)
    y += row.to(tl.int64) * inner
    for first in range(0, n_windows, WINDOWS):
        window = first + tl.arange(0, WINDOWS)
        begin, end = _ends(index, first_row + row, window, n_windows, starts_at, IS_WIDE)
        for done in range(0, tl.max(end - begin), STEPS * LANES):
            weights, column, kept = _slots(index, values, begin, end, done, columns_at, STEPS, LANES)
            tl.store(y + (window * 256)[None, :, None] + column, weights, mask=kept)

"""Triton kernels of the form "tiles": one or a few tokens, many tokens on tensor cores, and expansion to dense.

A thread takes a byte of the mask, eight consecutive columns, finds its first value by counting the bits before it in
its group, and then walks: a test, a load and a step for each weight. One value past the last may be read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify.kernels.gpu.triton.epilogue import activate
from sparsify.kernels.gpu.triton.sections import load_starts


@triton.jit
def _ones(bits):
    """Count the bits of a uint64. Written as LLVM knows it: it becomes the popc instruction."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((bits * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _find(index, rows, live, byte, n_groups, starts_at, bits_at, IS_WIDE: tl.constexpr):
    """Return (rows, bytes): eight bits of the mask, and the beginnings of the values of their columns. No row: 0."""
    at = rows[:, None] * n_groups + (byte // 8)[None, :]
    inside = live[:, None] & (byte < 8 * n_groups)[None, :]
    group = tl.load((index + bits_at).to(tl.pointer_type(tl.uint64)) + at, mask=inside, other=0)
    start = load_starts(index, starts_at, at, inside, IS_WIDE)
    row_start = tl.load(index.to(tl.pointer_type(tl.int32)) + rows, mask=live, other=0)
    shift = ((byte % 8) * 8).to(tl.uint64)[None, :]
    bits = ((group >> shift) & 0xFF).to(tl.int32)
    before = _ones(group & ((1 << shift) - 1))
    return bits, row_start[:, None] + start + before


@triton.jit
def _take(where, bits, B: tl.constexpr):
    """Load the weights of column B of each byte, 0 for removed ones; return them and the position of the next."""
    one = (bits >> B) & 1
    return tl.load(where, mask=one != 0, other=0.0), where + one


@triton.jit
def _expand(where, bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the dense tile (ROWS, COLUMNS); a thread keeps its eight columns side by side."""
    w0, where = _take(where, bits, 0)
    w1, where = _take(where, bits, 1)
    w2, where = _take(where, bits, 2)
    w3, where = _take(where, bits, 3)
    w4, where = _take(where, bits, 4)
    w5, where = _take(where, bits, 5)
    w6, where = _take(where, bits, 6)
    w7, where = _take(where, bits, 7)
    # join adds the fastest dimension last: the bits of a column's number, from the highest to the lowest
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), [ROWS, COLUMNS])


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
    inner,
    n_groups,
    starts_at,
    bits_at,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    IS_WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Multiply up to TOKENS rows of x (tokens, inner) without tensor cores. A program makes ROWS outputs of each."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < out
    token = tl.arange(0, TOKENS)
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    total = tl.zeros([TOKENS, ROWS, BYTES], tl.float32)
    for first in range(0, 8 * n_groups, BYTES):
        byte = first + tl.arange(0, BYTES)
        bits, at = _find(index, first_row + rows, live, byte, n_groups, starts_at, bits_at, IS_WIDE)
        where = values + at
        for b in tl.static_range(8):
            kept = (bits & (1 << b)) != 0
            weights = tl.load(where).to(tl.float32)  # read in vain where removed: a mask would cost an instruction
            where = tl.where(kept, where + 1, where)
            column = byte * 8 + b
            inside = (token < tokens)[:, None] & (column < inner)[None, :]
            inputs = tl.load(x_rows + column[None, :], mask=inside, other=0.0)
            product = weights[None, :, :] * inputs.to(tl.float32)[:, None, :]
            total = tl.where(kept[None, :, :], total + product, total)
    result = tl.sum(total, 2)
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=live, other=0.0).to(tl.float32)[None, :]
    result = activate(result, ACTIVATION).to(y.dtype.element_ty)
    tl.store(y + token[:, None] * out + rows[None, :], result, mask=(token < tokens)[:, None] & live[None, :])


@triton.jit(do_not_specialize=["tokens"])
def many(
    x,
    index,
    values,
    bias,
    y,
    tokens,
    x_stride,
    first_row,
    out,
    inner,
    n_groups,
    starts_at,
    bits_at,
    columns_per_split,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_WIDENED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Multiply up to TOKENS rows of x by ROWS rows of the weight, expanded tile by tile, on tensor cores.

    Split, a program takes one range of columns, and y is float32 (splits, tokens, out) for `finish` to add up.
    IS_WIDENED is for Triton's interpreter, which has no bfloat16 product.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < out
    token = tl.arange(0, TOKENS)
    begin = tl.program_id(1) * columns_per_split
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for first in range(begin, tl.minimum(begin + columns_per_split, inner), COLUMNS):
        byte = first // 8 + tl.arange(0, COLUMNS // 8)
        bits, at = _find(index, first_row + rows, live, byte, n_groups, starts_at, bits_at, IS_WIDE)
        tile = _expand(values + at, bits, ROWS, COLUMNS)
        column = first + tl.arange(0, COLUMNS)
        inside = (token < tokens)[:, None] & (column < inner)[None, :]
        inputs = tl.load(x_rows + column[None, :], mask=inside, other=0.0)
        if IS_WIDENED:
            tile, inputs = tile.to(tl.float32), inputs.to(tl.float32)
        total = tl.dot(tile, tl.trans(inputs), total, input_precision="ieee")
    where = token[None, :] * out + rows[:, None]
    if IS_SPLIT:
        where += tl.program_id(1) * tokens * out
    else:
        if HAS_BIAS:
            total += tl.load(bias + rows, mask=live, other=0.0).to(tl.float32)[:, None]
        total = activate(total, ACTIVATION)
    tl.store(y + where, total.to(y.dtype.element_ty), mask=live[:, None] & (token < tokens)[None, :])


@triton.jit
def dense(
    index,
    values,
    y,
    first_row,
    out,
    inner,
    n_groups,
    starts_at,
    bits_at,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    """Write the dense weight (out, inner), zeros included."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < out
    first = tl.program_id(1) * COLUMNS
    bits, at = _find(
        index, first_row + rows, live, first // 8 + tl.arange(0, COLUMNS // 8), n_groups, starts_at, bits_at, IS_WIDE
    )
    tile = _expand(values + at, bits, ROWS, COLUMNS)
    column = first + tl.arange(0, COLUMNS)
    where = rows.to(tl.int64)[:, None] * inner + column[None, :]
    tl.store(y + where, tile, mask=live[:, None] & (column < inner)[None, :])

"""The Triton kernel of the form "blocks": a row of blocks against a tile of tokens, on tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify.kernels.gpu.triton.epilogue import activate


@triton.jit(do_not_specialize=["tokens"])
def multiply(
    x,
    index,
    values,
    bias,
    y,
    tokens,
    x_stride,
    first_row,
    out,
    n_block_rows,
    columns_at,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    IS_WIDENED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Make SIZE outputs of TOKENS rows of x; of a block across `first_row` only the rows from there on."""
    block_row = first_row // SIZE + tl.program_id(0) % n_block_rows
    inner = tl.arange(0, SIZE)
    token = tl.program_id(0) // n_block_rows * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    starts = index.to(tl.pointer_type(tl.int32)) + block_row
    columns = (index + columns_at).to(tl.pointer_type(tl.int32))
    total = tl.zeros([SIZE, TOKENS], tl.float32)
    first, end = tl.load(starts), tl.load(starts + 1)
    here = values + first.to(tl.int64) * (SIZE * SIZE)
    for block in range(first, end):
        column = tl.load(columns + block) * SIZE + inner
        inputs = tl.load(x_rows + column[None, :], mask=live[:, None], other=0.0)
        weights = tl.load(here + inner[:, None] * SIZE + inner[None, :])
        here += SIZE * SIZE
        if IS_WIDENED:
            weights, inputs = weights.to(tl.float32), inputs.to(tl.float32)
        total = tl.dot(weights, tl.trans(inputs), total, input_precision="ieee")
    row = block_row * SIZE + inner - first_row
    asked = (row >= 0) & (row < out)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=asked, other=0.0).to(tl.float32)[:, None]
    where = y + token.to(tl.int64)[None, :] * out + row[:, None]
    tl.store(where, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=asked[:, None] & live[None, :])

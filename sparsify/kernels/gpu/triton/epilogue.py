"""The end of every Triton kernel: the bias, the activation, and the sum of split products in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """Apply an activation, by its number in reference.ACTIVATIONS, to float32."""
    if ACTIVATION == 1:
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    elif ACTIVATION == 2:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))  # the root of 1/2
    elif ACTIVATION == 3:
        # tanh(z) = 2 sigmoid(2 z) - 1, and 2 z = 2 sqrt(2 / pi) (y + 0.044715 y^3)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == 4:
        y = y * tl.sigmoid(y)
    elif ACTIVATION == 5:
        gate = tl.where(y < -3, 0.0, tl.where(y > 3, 6.0, y + 3))
        y = y * gate / 6
    elif ACTIVATION == 6:
        y = tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))
    return y


@triton.jit
def finish(partial, bias, y, n_splits, n, out, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Add up partial products (n_splits, n) from the first to the last, always in this order; n is tokens x out."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(n_splits):
        total += tl.load(partial + split * n + at, mask=live, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % out, mask=live, other=0.0).to(tl.float32)
    tl.store(y + at, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=live)

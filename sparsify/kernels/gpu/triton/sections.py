"""Sections of an `index`, read by Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_starts(index, starts_at, at, inside, IS_WIDE: tl.constexpr):
    """Return the starts with these numbers as int32, 0 outside."""
    if IS_WIDE:
        starts = tl.load((index + starts_at).to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
    else:
        starts = tl.load((index + starts_at).to(tl.pointer_type(tl.uint16)) + at, mask=inside, other=0).to(tl.int32)
    return starts

"""Memory for large outputs of kernels, kept for the next output once a tensor is gone.

The C library gives large blocks back to the system and gets new ones page by page: of a detector of images of 640 x 640
that is a tenth of the time.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Bytes from which an output gets kept memory: below, the C library keeps it.
LEAST_BYTES = 1 << 19
#: Bytes of blocks without a tensor that are kept at most.
KEPT_BYTES = 256 << 20

_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)  # a fork gets its own copy


class _Block:
    """A piece of memory. At most one tensor, with its views, has it at a time."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.memory = mmap.mmap(-1, n_bytes, flags=_PRIVATE)
        self.kind = ctypes.c_char * n_bytes
        self.lease: Any = None  # a weak reference to what the tensor holds


#: Blocks without a tensor, those given back last at the end. Only operations that no other thread can interrupt.
_free: list[_Block] = []


def empty(size: Sequence[int], dtype: torch.dtype, *, channels_last: bool = False) -> Tensor:
    """Make an uninitialised tensor on the CPU, without gaps, of images with channels last if told so.

    A large one cannot be resized to more elements.
    """
    n_values = math.prod(size)
    n_bytes = n_values * dtype.itemsize
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if n_bytes < LEAST_BYTES or not _PRIVATE:
        return torch.empty(size, dtype=dtype, device="cpu", memory_format=layout)
    strides = torch.empty(size, dtype=dtype, device="meta", memory_format=layout).stride()
    flat = torch.frombuffer(_lease(n_bytes), dtype=dtype, count=n_values)
    # A tensor of its own, no view: of a view made without gradients autograd refuses later changes in place.
    return torch.empty(0, dtype=dtype, device="cpu").set_(flat.untyped_storage(), 0, tuple(size), strides)


def _lease(n_bytes: int) -> Any:
    """Return memory of at least so many bytes, which is free again once nothing refers to the result."""
    block = _take(n_bytes)
    lease = block.kind.from_buffer(block.memory)
    block.lease = weakref.ref(lease, lambda _: _give_back(block))
    return lease


def _take(n_bytes: int) -> _Block:
    """Take the smallest free block with enough room; if there is none, a new one in the place of the largest.

    Of equal blocks the one given back last, which a cache may still hold.
    """
    free = sorted(_free[::-1], key=lambda block: block.n_bytes)
    for block in free:
        if block.n_bytes >= n_bytes and _remove(block):
            return block
    if free:
        _remove(free[-1])
    return _Block(n_bytes)


def _give_back(block: _Block) -> None:
    """Keep a block, and no longer those kept longest if there is too much."""
    if block.n_bytes <= KEPT_BYTES:
        _free.append(block)
    kept = _free.copy()
    too_much = sum(other.n_bytes for other in kept) - KEPT_BYTES
    for other in kept:
        if too_much <= 0:
            return
        if _remove(other):
            too_much -= other.n_bytes


def _remove(block: _Block) -> bool:
    """Remove a block from the free ones; return whether no other thread was faster."""
    try:
        _free.remove(block)
    except ValueError:
        return False
    return True

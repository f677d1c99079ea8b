"""Freed memory kept by the C library for a while, instead of returned to the system at once."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# malloc.h of glibc; the values after a block are those that its own adjustment ends at in a process with large tensors.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEPING = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**26}
_USUAL = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26, _TOP_PAD: 2**17}

_n_blocks = 0


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Inside the block, let freed memory serve the next allocations; at its end the system gets back what is left.

    glibc takes large tensors from the system one by one, and returns the memory that a training step ends with: in the
    next step the system clears all of it anew, page by page. A step of a 135M-parameter model took 5.4 s, and 3.8 s
    inside such a block (two threads, Emerald Rapids). With another C library nothing changes.
    """
    global _n_blocks
    _n_blocks += 1
    try:
        if _n_blocks == 1:
            _set(_KEEPING)
        yield
    finally:
        _n_blocks -= 1
        if _n_blocks == 0:
            _set(_USUAL)
            return_freed_memory()


def return_freed_memory() -> None:
    """Give the system the memory that the C library holds and nobody uses, with glibc.

    It keeps the holes left by weights and activations: a model of 100 MB, with 3 MB of it in use at a time, grew by up
    to 300 MB, and by about 50 MB with such a call after each change.
    """
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _set(options: dict[int, int]) -> None:
    if _is_glibc():
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"

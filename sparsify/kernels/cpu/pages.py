"""Huge pages for packed weights: at one token a weight comes from memory, and its addresses too, page by page."""

import ctypes
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

from torch import Tensor

_HUGE_PAGE = 2 * 1024 * 1024  # bytes, on x86; a processor with larger ones declines
_MADV_COLLAPSE = 25  # Linux 6.1
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Have the memory of tensors on the CPU moved to huge pages, whole ones that lie within a tensor.

    The addresses and contents stay, and no more memory is in use. Where the system cannot, or its setting of
    transparent huge pages is "never", nothing happens.
    """
    if _madvise is None:
        return
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.numel() * tensor.element_size() < _HUGE_PAGE:
            continue
        first = tensor.data_ptr()
        begin = -(-first // _HUGE_PAGE) * _HUGE_PAGE
        end = (first + tensor.numel() * tensor.element_size()) // _HUGE_PAGE * _HUGE_PAGE
        if begin < end:
            _madvise(begin, end - begin, _MADV_COLLAPSE)


def _find_madvise() -> Callable[[int, int, int], int] | None:
    """Return the system's madvise, or None where huge pages are not wanted or not known."""
    if sys.platform != "linux" or not _SETTING.exists() or "[never]" in _SETTING.read_text():
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.restype, madvise.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return cast(Callable[[int, int, int], int], madvise)


_madvise = _find_madvise()

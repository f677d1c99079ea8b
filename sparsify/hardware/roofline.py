"""The roofline of this machine, measured with the native library: multiply-adds and bytes read per second."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from sparsify.kernels.cpu import library as native

#: Each roof is the best of this many measurements: another process can only make one smaller.
N_TRIES = 5


def fma_gflops(seconds: float = 0.2, n_tries: int = N_TRIES) -> float:
    """Measure the peak of float32 multiply-adds (two operations each) of the kernel in use, on torch's threads."""
    signature = [ctypes.c_double, ctypes.c_int]
    return _best("sparsify_measure_fma_gflops", signature, seconds, n_tries, torch.get_num_threads())


def read_gbs(n_bytes: int, seconds: float = 0.2) -> float:
    """Measure how many GB/s torch's threads can read together from a buffer of `n_bytes` bytes.

    Raises ValueError for a buffer too small to share (512 bytes a thread).
    """
    signature = [ctypes.c_double, ctypes.c_int, ctypes.c_int64]
    return _best("sparsify_measure_read_gbs", signature, seconds, N_TRIES, torch.get_num_threads(), n_bytes)


def _best(name: str, signature: Sequence[Any], seconds: float, n_tries: int, *arguments: int) -> float:
    if not native.available():
        raise RuntimeError(f"roofs are measured by the native library: {native.why_missing()}; see 'sparsify doctor'")
    function = native.function(name, (ctypes.c_double, list(signature)))
    best: float = max(function(seconds / n_tries, *arguments) for _ in range(n_tries))
    if best < 0:
        raise ValueError(
            f"{name}({seconds}, {', '.join(map(str, arguments))}): argument out of range, or out of memory"
        )
    return best

"""Check, before any write, for tensors that take none: expanded, made in inference mode, or in read-only memory."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def cannot_be_written(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a sentence for each tensor not writable in place now, with its name and the way out.

    >>> next(cannot_be_written({"bias": torch.zeros(1).expand(3)}))
    'bias cannot be written: it is expanded, several elements are one; give it memory of its own with .clone()'
    """
    writable = None
    for name, tensor in tensors.items():
        if tensor.is_meta or is_lazy(tensor) or tensor.layout is not torch.strided:
            continue
        if tensor.is_inference():
            yield f"{name} cannot be written: it was made inside torch.inference_mode(); build the model outside it"
        elif any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
            yield (
                f"{name} cannot be written: it is expanded, several elements are one; "
                "give it memory of its own with .clone()"
            )
        elif tensor.is_cpu and tensor.nbytes and _is_foreign(tensor):
            writable = _writable_memory() if writable is None else writable
            first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1
            if writable and not (_lies_in(first, writable) and _lies_in(last, writable)):
                yield f"{name} cannot be written: its memory is read-only, as of a mapped file; clone it first"


def _is_foreign(tensor: Tensor) -> bool:
    """Return whether a tensor's memory is not from torch's allocator, but from a file or numpy."""
    return type(tensor).__name__ != "DTensor" and not tensor.untyped_storage().resizable()


def _writable_memory() -> list[tuple[int, int]]:
    """Return the process's writable memory as ordered (begin, end) pieces; empty on systems without /proc."""
    maps = Path("/proc/self/maps")
    pieces: list[tuple[int, int]] = []
    for line in maps.read_text().splitlines() if maps.exists() else ():
        where, rights = line.split(maxsplit=2)[:2]
        if "w" in rights:
            begin, end = (int(address, 16) for address in where.split("-"))
            pieces.append((begin, end))
    return pieces


def _lies_in(address: int, pieces: list[tuple[int, int]]) -> bool:
    number = bisect.bisect_right(pieces, (address, 2**64)) - 1
    return number >= 0 and address < pieces[number][1]

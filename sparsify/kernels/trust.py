"""Indices that kernels may follow: checked when they are first used, and again once they have changed.

A kernel goes wherever its index sends it, so one wrong number would end the process. A full check reads the whole
index and takes longer than most calls. A call therefore only asks for the tensor of an earlier check, in the same
version and memory. A write through `.data` or numpy is not counted by torch and goes unnoticed, except in memory shared
with other processes: there, and for inference tensors without a version, a call compares the index with a checked
copy, and the kernel follows the copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: The indices that have passed, by id: the tensor, its version and memory, and what it was checked for.
_PASSED: dict[int, tuple[weakref.ref[Tensor], int, int, tuple[Any, ...]]] = {}
#: Those whose changes cannot be seen, each with a copy that has passed.
_COPIES: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor]] = {}

#: Entries of tensors that are gone are taken out once there are so many, and as often as that number doubles.
_FEWEST = 256


def trusted(index: Tensor, check: Callable[..., None], *about: Any) -> Tensor:
    """Return an index for a kernel to follow: the same tensor, or a copy of it.

    check(index, *about) raises ValueError for an unsafe index; its answer depends on nothing but `about`.
    """
    passed = _PASSED.get(id(index))
    if (
        passed is not None
        and passed[0]() is index
        and passed[1] == index._version
        and passed[2] == index.data_ptr()
        and passed[3] == about
    ):
        return index
    if index.is_inference() or _is_shared(index):
        return _trusted_copy(index, check, about)
    _examine(index, check, about)
    trust(index, *about)
    return index


def trust(index: Tensor, *about: Any) -> None:
    """Note an index as checked, or as just packed."""
    if not index.is_inference() and not _is_shared(index):
        if len(_PASSED) >= _FEWEST and len(_PASSED) & (len(_PASSED) - 1) == 0:
            _forget_the_gone(_PASSED)
        _PASSED[id(index)] = weakref.ref(index), index._version, index.data_ptr(), about


def _trusted_copy(index: Tensor, check: Callable[..., None], about: tuple[Any, ...]) -> Tensor:
    known = _COPIES.get(id(index))
    if known is not None and known[0]() is index and known[1] == about and torch.equal(known[2], index):
        return known[2]
    copy = index.detach().clone()
    _examine(copy, check, about)
    _forget_the_gone(_COPIES)
    _COPIES[id(index)] = weakref.ref(index), about, copy
    return copy


def _forget_the_gone(known: dict[int, Any]) -> None:
    for key, entry in list(known.items()):
        if entry[0]() is None:
            known.pop(key, None)


def _examine(index: Tensor, check: Callable[..., None], about: tuple[Any, ...]) -> None:
    try:
        check(index, *about)
    except ValueError as error:
        raise ValueError(
            f"the weight of an exported layer cannot be read: {error}; it was changed, or never loaded: "
            "load it (load_state_dict, sparsify.load) before it is used"
        ) from None


def _is_shared(index: Tensor) -> bool:
    """Return whether other processes may write an index; of memory on a GPU torch says so in any case."""
    return index.is_cpu and index.is_shared()

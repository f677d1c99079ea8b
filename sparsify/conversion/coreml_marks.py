"""Marks that coremltools reads: buffers that say which weights of a dense model are to be stored sparse.

The names are those of coremltools' own pruned models: a version on the model, and beside a parameter NAME the buffer
`_COREML_/NAME/compression_type`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

#: The runtimes that `to_dense` has marks for.
MARKS = ("coreml",)

_PREFIX = "_COREML_/"
_METADATA_VERSION, _PRUNED = 1, 1


def check_mark(mark: str | None) -> None:
    """Raise ValueError for a runtime without marks."""
    if mark is not None and mark not in MARKS:
        raise ValueError(f"mark={mark!r} is none of: {', '.join(MARKS)}")


def mark_for_coreml(model: nn.Module, layers: Collection[str]) -> None:
    """Mark the weights of dense layers, by the names that their masked or packed forms had."""
    marked = False
    for name in layers:
        owner, parameter = _weight_of(model, name)
        if owner is not None:
            owner.register_buffer(f"{_PREFIX}{parameter}/compression_type", torch.tensor([_PRUNED]))
            marked = True
    if marked:
        model.register_buffer(f"{_PREFIX}metadata_version", torch.tensor(_METADATA_VERSION))


def _weight_of(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """Return the module and the name of the Parameter that a layer's weight is in now; None if it has no place."""
    modules = dict(model.named_modules())
    if name in modules and modules[name]._parameters.get("weight") is not None:
        return modules[name], "weight"
    parent, _, last = name.rpartition(".")  # in_proj of a converted nn.MultiheadAttention
    parameter = f"{last}_weight"
    if parent in modules and modules[parent]._parameters.get(parameter) is not None:
        return modules[parent], parameter
    return None, ""

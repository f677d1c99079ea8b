"""Checks of dense weights from files of other tools, tensor by tensor."""

from __future__ import annotations

import os

import torch
from torch import Tensor

#: Weights of these dtypes are cast to one another; every other dtype needs a scale or loses a part of its values.
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_dtype(path: str | os.PathLike[str], name: str, found: torch.dtype, wanted: torch.dtype) -> None:
    """Raise ValueError if values of one dtype are not values of the other: without a scale, or in part only."""
    if found != wanted and not (found in PLAIN and wanted in PLAIN):
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (found, wanted)]
        raise ValueError(
            f"{path}: {name} is {dtypes[0]} in the file and {dtypes[1]} in the model; save it as {dtypes[1]} "
            "(quantized weights: dequantize them first, their scale is not read)"
        )


def check_weights(path: str | os.PathLike[str], name: str, found: Tensor, wanted: Tensor) -> None:
    """Raise ValueError if a tensor of a file does not fit one of the model: shape, dtype, layout, NaN."""
    if found.shape != wanted.shape:
        raise ValueError(f"{path}: {name} is {tuple(found.shape)} in the file, {tuple(wanted.shape)} in the model")
    check_dtype(path, name, found.dtype, wanted.dtype)
    if found.layout != torch.strided or found.is_meta:
        raise ValueError(f"{path}: {name} holds no plain values ({found.layout} on {found.device}); save it dense")
    check_values(path, name, found)


def check_values(path: str | os.PathLike[str], name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor of a file holds NaN."""
    if (tensor.is_floating_point() or tensor.is_complex()) and bool(tensor.isnan().any()):
        module, _, key = name.rpartition(".")
        raise ValueError(f"{path}: {module or '(root)'}: the {key} holds NaN; take weights that are whole")

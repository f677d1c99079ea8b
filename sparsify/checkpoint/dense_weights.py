"""Dense weights in files of other tools: read without running code, and checked tensor by tensor."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sparsify.checkpoint.tensor_file import TensorFile, open_unchanged
from sparsify.errors import CheckpointError
from sparsify.user_code import blaming

#: Weights of these dtypes are cast to one another; every other dtype needs a scale or loses a part of its values.
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state_dict from .safetensors, or from .pt/.pth/.bin opened with weights_only, so that it runs no code.

    Raises ValueError for a file that is neither, FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        try:
            with TensorFile(path) as tensors:
                return {name: tensors.read(name) for name in tensors}
        except CheckpointError as error:  # a file of another tool is no checkpoint of ours
            raise ValueError(str(error)) from error
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"{path}: weights are read from .safetensors, .pt, .pth or .bin")
    with blaming(str(path)), open_unchanged(path) as file:
        _check_not_packed(file)
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path}: not a state_dict; save model.state_dict(), not the model")
    if odd := [key for key in state if not isinstance(key, str)]:
        raise ValueError(f"{path}: not a state_dict: its key {odd[0]!r} is no name; save model.state_dict()")
    return state


def check_dtype(path: str | os.PathLike[str], name: str, found: torch.dtype, wanted: torch.dtype) -> None:
    """Raise ValueError if values of one dtype are not values of the other: without a scale, or in part only."""
    if found != wanted and not (found in PLAIN and wanted in PLAIN):
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (found, wanted)]
        raise ValueError(
            f"{path}: {name} is {dtypes[0]} in the file and {dtypes[1]} in the model; save it as {dtypes[1]} "
            "(quantized weights: dequantize them first, their scale is not read)"
        )


def check_weights(path: str | os.PathLike[str], name: str, found: Tensor, wanted: Tensor) -> None:
    """Raise ValueError if a tensor of a file cannot be what one of the model holds: shape, dtype, layout, NaN."""
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


def _check_not_packed(file: BinaryIO) -> None:
    """Refuse a zip that holds more than its own size: torch.save does not compress, and a few bytes may become many."""
    size = file.seek(0, os.SEEK_END)
    if zipfile.is_zipfile(file):
        n_bytes = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
        if n_bytes > size:
            raise ValueError(f"a file of {size} bytes that unpacks to {n_bytes}; torch.save packs nothing")
    file.seek(0)

"""Dense weights in files of other tools, read without running code."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sparsify.checkpoint.tensor_file import TensorFile, open_unchanged
from sparsify.cli.user_code import blaming
from sparsify.errors import CheckpointError


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state_dict from .safetensors, or from .pt/.pth/.bin opened with weights_only, without running code.

    Raises ValueError for any other file, and FileNotFoundError.
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


def _check_not_packed(file: BinaryIO) -> None:
    """Refuse a zip with more content than its own size: torch.save never compresses."""
    size = file.seek(0, os.SEEK_END)
    if zipfile.is_zipfile(file):
        n_bytes = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
        if n_bytes > size:
            raise ValueError(f"a file of {size} bytes that unpacks to {n_bytes}; torch.save packs nothing")
    file.seek(0)

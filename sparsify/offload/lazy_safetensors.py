"""Weights in safetensors files, read one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsify.checkpoint.dense_weights import check_values
from sparsify.checkpoint.tensor_file import TensorFile


class LazySafetensors:
    """The tensors of a safetensors file, or of a folder of them with an index, read one at a time.

    All files are opened at once, and stay the same ones if others are put in their place. Raises ValueError for a
    folder without such files, or if another program writes into one; OSError for a missing path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        opened = {file: TensorFile(file) for file in self._find()}
        for file, tensors in opened.items():
            if not tensors.is_at(file):  # the others may be a mixture of new ones and old ones
                raise ValueError(f"{file}: another program replaced it while the weights were being opened; try again")
        self._places: dict[str, tuple[TensorFile, str]] = {}  # the file, and the name there
        for tensors in opened.values():
            if twice := [name for name in tensors if name in self._places]:
                others = self._places[twice[0]][0].path, tensors.path
                raise ValueError(f"{self.path}: {twice[0]} is in two files, {others[0]} and {others[1]}; take one away")
            self._places |= {name: (tensors, name) for name in tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> Tensor:
        """Read a tensor into memory of its own."""
        file, name_there = self._places[name]
        tensor = file.read(name_there)
        check_values(file.path, name_there, tensor)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading it."""
        file, name_there = self._places[name]
        return file.dtype(name_there)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        file, name_there = self._places[name]
        return file.shape(name_there)

    def rename(self, dense: Mapping[str, nn.Parameter], converted: nn.Module) -> None:
        """Follow a conversion: give each tensor the present name of its Parameter.

        dense: the Parameters by their names before.
        """
        now = dict(converted.named_parameters(remove_duplicate=False))
        names = {id(parameter): name for name, parameter in now.items()}
        for name, parameter in dense.items():
            if name in self._places and name not in now and id(parameter) in names:
                self._places[names[id(parameter)]] = self._places.pop(name)

    def _find(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no weights file or folder {self.path}")
        index = self.path / "model.safetensors.index.json"
        files = _indexed(index) if index.is_file() else sorted(filter(Path.is_file, self.path.glob("*.safetensors")))
        if not files:
            raise ValueError(
                f"{self.path}: there is no .safetensors file in this folder, and other files do not stream"
            )
        return files


def _indexed(index: Path) -> list[Path]:
    """Return the files of an index, all in its folder."""
    try:
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not an index of weights (a JSON object with a weight_map to file names)") from None
    if odd := [name for name in named if not isinstance(name, str) or Path("x", name).parent != Path("x")]:
        raise ValueError(f"{index}: it names {odd[0]!r}, which is no name of a file beside it")
    files = [index.parent / name for name in named]
    if missing := [file.name for file in files if not os.path.isfile(file)]:
        raise FileNotFoundError(f"{index}: it names {missing[0][:200]!r}, which is not there")
    return files

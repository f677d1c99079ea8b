"""An open safetensors file, read without a mapping: no other program can change the data unnoticed.

A mapped file kills the process when it shrinks, and a path opened twice may be two files. So a file is opened once and
read through its descriptor: a file replaced meanwhile is still the old one; a file cut or rewritten in place is an
error.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from sparsify.errors import CheckpointError

#: The dtypes that a file may hold, under safetensors' names.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_CHANGED = "another program changed it while it was being read; try again"
_MAX_DIMS = 64  # torch's own limit in most operators


class _Place(BaseModel):
    """A tensor in the file's header."""

    model_config = ConfigDict(extra="forbid", strict=True)
    dtype: str
    shape: list[NonNegativeInt] = Field(max_length=_MAX_DIMS)
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class _Table(BaseModel):
    """The JSON object at the beginning of the file: a `_Place` for each name, and a dict of texts."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, _Place] = Field(init=False)
    metadata_: dict[str, str] = Field(default_factory=dict, alias="__metadata__")


class TensorFile:
    """An open file of named tensors; dtypes and shapes are known at once, tensors are read one at a time.

    Raises CheckpointError, with the path, for a file other than a whole safetensors file, and while reading for a file
    changed by another program since it was opened. Raises OSError for a path that cannot be opened.

    >>> import safetensors.torch
    >>> safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    >>> with TensorFile(tmp_path / "a.safetensors") as file:
    ...     list(file), file.dtype("a"), file.shape("a"), file.read("a")
    (['a'], torch.float32, (2,), tensor([1., 1.]))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._file, self._stamp = _open(path)
        self._finalizer = weakref.finalize(self, os.close, self._file)
        try:
            table, self._data_start = self._read_table()
            self.metadata = table.metadata_
            self._places = table.model_extra or {}
            self._check_places()
        except CheckpointError as error:
            self.close()
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); was it cut off, or written by torch.save?"
            ) from None
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return _BY_NAME[self._places[name].dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._places[name].shape)

    def read(self, name: str) -> Tensor:
        """Read a tensor into memory of its own, on the CPU."""
        with torch.inference_mode(False):  # what is read becomes part of models
            tensor = torch.empty(self.shape(name), dtype=self.dtype(name), device="cpu")
        as_bytes = tensor.reshape(-1).view(torch.uint8)
        self._read_into(as_bytes.numpy().data, self._data_start + self._places[name].data_offsets[0])
        self.check_unchanged()
        if tensor.dtype == torch.bool and bool((as_bytes > 1).any()):
            raise CheckpointError(f"{self.path}: {name} is BOOL, but has bytes that are neither 0 nor 1")
        return tensor

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file was changed since it was opened; a replaced file is still itself."""
        if _stamp(self._file) != self._stamp:
            raise CheckpointError(f"{self.path}: {_CHANGED}")

    def is_at(self, path: str | os.PathLike[str]) -> bool:
        """Return whether this is the present file of a path."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file."""
        self._finalizer()

    def _read_table(self) -> tuple[_Table, int]:
        """Return the header, and the offset of the tensors' bytes."""
        size = self._stamp[0]
        if size < 8:
            raise CheckpointError(f"it has {size} bytes")
        length = bytearray(8)
        self._read_into(memoryview(length), 0)
        n = int.from_bytes(length, "little")
        if n > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"its header is to have {n} bytes")
        text = bytearray(n)
        self._read_into(memoryview(text), 8)
        try:
            return _Table.model_validate_json(bytes(text)), 8 + n
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part)[:80] for part in first["loc"])
            raise CheckpointError(f"its header is wrong{' at ' if where else ''}{where}: {first['msg']}") from None

    def _check_places(self) -> None:
        """Check that the tensors lie one behind the other, and fill the file."""
        end = 0
        for name, place in sorted(self._places.items(), key=lambda item: item[1].data_offsets):
            shown = repr(name if len(name) <= 80 else name[:80] + "...")
            if place.dtype not in _BY_NAME:
                raise CheckpointError(f"tensor {shown} has the dtype {place.dtype[:20]!r}, which is not read")
            if math.prod(max(size, 1) for size in place.shape) >= 2**63:
                raise CheckpointError(f"tensor {shown} has an impossible shape")
            n_bytes = math.prod(place.shape) * _BY_NAME[place.dtype].itemsize
            begin, after = place.data_offsets
            if begin != end or after - begin != n_bytes:
                raise CheckpointError(
                    f"tensor {shown} of {n_bytes} bytes lies at {begin} to {after}, expected at {end}"
                )
            end = after
        if self._data_start + end != self._stamp[0]:
            raise CheckpointError(
                f"its tensors take {end} bytes, and it has {self._stamp[0] - self._data_start} for them"
            )

    def _read_into(self, buffer: memoryview, start: int) -> None:
        done = 0
        while done < len(buffer):
            n = os.preadv(self._file, [buffer[done:]], start + done)
            if n == 0:
                raise CheckpointError(f"{self.path}: {_CHANGED}")
            done += n

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def open_unchanged(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file of any kind for reading; raise CheckpointError in the end if another program changed it meanwhile."""
    descriptor, before = _open(path)
    with open(descriptor, "rb") as file:
        yield file
        if _stamp(descriptor) != before:
            raise CheckpointError(f"{path}: {_CHANGED}")


def _open(path: str | os.PathLike[str]) -> tuple[int, tuple[int, int]]:
    """Open an ordinary file, and return its stamp too; anything else is an OSError, and a pipe is not waited for."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return file, _stamp(file)
    os.close(file)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, not a file")
    raise OSError(f"{path} is a device or a pipe, not a file")


def _stamp(file: int) -> tuple[int, int]:
    """Return the marks of a write to an open file: its size, and the time of the last write.

    Not the time of the last change of status: a rename of another file over this one changes it too.
    """
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns

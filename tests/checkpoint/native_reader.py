"""The C interface of checkpoints behind ctypes: a file opened, and all that it holds as tensors."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify.checkpoint.tensor_file import DTYPES
from sparsify.kernels.cpu import library

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
BAD_FILE, NOT_FOUND = -8, -9  # of sparsify.h


class StoredLayer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_char_p) for name in ("name", "module", "format", "dtype", "dequantized", "form")),
        *((name, ctypes.c_int64) for name in ("out", "in_", "n_kept")),
        ("scale", ctypes.POINTER(ctypes.c_float)),
    )


class StoredTensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("n_dims", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    )


class Layer(NamedTuple):
    module: str
    format: str
    form: str
    dequantized: str
    shape: tuple[int, int]
    crow: Tensor
    col: Tensor
    values: Tensor
    scale: Tensor | None


class Contents(NamedTuple):
    layers: dict[str, Layer]
    tensors: dict[str, Tensor]


class Refused(Exception):
    """The library refused the file, with this reason."""


_handle, _number = ctypes.c_void_p, ctypes.c_int64


def _function(name: str, result: Any, *arguments: Any) -> Any:
    return library.function(f"sparsify_checkpoint_{name}", (result, list(arguments)))


@contextmanager
def opened(path: Path) -> Iterator[ctypes.c_void_p]:
    open_, close = _function("open", _handle, ctypes.c_char_p, ctypes.c_char_p, _number, ctypes.c_void_p), None
    message, status = ctypes.create_string_buffer(400), ctypes.c_int(1)
    handle = open_(str(path).encode(), message, len(message), ctypes.byref(status))
    if not handle:
        assert status.value == BAD_FILE, status.value
        raise Refused(message.value.decode(errors="replace"))
    assert status.value == 0
    close = _function("close", None, _handle)
    try:
        yield handle
    finally:
        close(handle)


def read(path: Path) -> Contents:
    """Return everything in a file. Raises Refused."""
    with opened(path) as handle:
        n_layers, n_tensors = (_function(f"n_{what}", _number, _handle)(handle) for what in ("layers", "tensors"))
        layers = dict(_layer(handle, number) for number in range(n_layers))
        return Contents(layers, dict(_tensor(handle, number) for number in range(n_tensors)))


def find(handle: Any, what: str, name: str) -> int:
    """Return the number of a layer or a tensor by its name."""
    return int(_function(f"find_{what}", _number, _handle, ctypes.c_char_p)(handle, name.encode()))


def _layer(handle: Any, number: int) -> tuple[str, Layer]:
    found = StoredLayer()
    assert _function("layer", ctypes.c_int, _handle, _number, ctypes.c_void_p)(handle, number, ctypes.byref(found)) == 0
    crow = torch.full((found.out + 1,), -1, dtype=torch.int32)
    col = torch.full((found.n_kept,), -1, dtype=torch.int32)
    values = torch.empty(found.n_kept, dtype=_DTYPES[found.dtype.decode()])
    csr = _function("csr", ctypes.c_int, _handle, _number, *[ctypes.c_void_p] * 3)
    assert csr(handle, number, crow.data_ptr(), col.data_ptr(), values.data_ptr()) == 0
    scale = torch.tensor(found.scale[: found.out]) if found.scale else None
    texts = (text.decode() for text in (found.module, found.format, found.form, found.dequantized))
    return found.name.decode(), Layer(*texts, (found.out, found.in_), crow, col, values, scale)


def _tensor(handle: Any, number: int) -> tuple[str, Tensor]:
    found = StoredTensor()
    of = _function("tensor", ctypes.c_int, _handle, _number, ctypes.c_void_p)
    assert of(handle, number, ctypes.byref(found)) == 0
    assert found.data % 64 == 0
    raw = bytearray(ctypes.string_at(found.data, found.bytes))
    dtype, shape = _DTYPES[found.dtype.decode()], tuple(found.sizes[: found.n_dims])
    tensor = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return found.name.decode(), tensor.reshape(shape)

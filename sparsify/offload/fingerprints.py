"""Fingerprints: SHA-256 of calibration data and of models, so as to know the inputs of a run by their content."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def data_fingerprint(batches: Iterable[Any]) -> str:
    """Return a SHA-256 over calibration data: tensors, arrays and plain values, in their nesting and under their keys.

    Of an object of another type only the type counts. Raises ValueError for a tensor without data.

    >>> data_fingerprint([torch.ones(2)]) == data_fingerprint([torch.ones(2)])
    True
    >>> data_fingerprint([{"a": torch.ones(2)}]) == data_fingerprint([{"b": torch.ones(2)}])
    False
    """
    digest = hashlib.sha256()
    for batch in batches:
        _add(digest.update, batch)
    return digest.hexdigest()


def structure_fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over a model without its tensors: its printed form, and the code of its modules' classes.

    Classes of torch count by name.
    """
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    codes = sorted({_code(kind) for kind in {type(module) for module in model.modules()}})
    return hashlib.sha256("\0".join([structure, *codes]).encode(errors="surrogatepass")).hexdigest()


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 over named tensors, with one at a time in memory."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        _add(digest.update, name)
        _add(digest.update, tensor)
    return digest.hexdigest()


def _add(update: Callable[[Any], None], value: Any) -> None:
    """Add a value with its type and size before it, so as to keep any two different ones apart."""
    if isinstance(value, Tensor):
        _add_tensor(update, value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        update(f"array {value.dtype} {value.shape} ".encode())
        update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=repr):
            _add(update, key)
            _add(update, value[key])
    elif isinstance(value, (list, tuple)):
        update(f"sequence {len(value)} ".encode())
        for item in value:
            _add(update, item)
    elif isinstance(value, _PLAIN):
        text = repr(value)
        update(f"{type(value).__name__} {len(text)} {text}".encode(errors="surrogatepass"))
    else:
        update(f"object {type(value).__qualname__} ".encode())
        if is_dataclass(value) and not isinstance(value, type):
            _add(update, {field.name: getattr(value, field.name) for field in fields(value)})


def _add_tensor(update: Callable[[Any], None], tensor: Tensor) -> None:
    if tensor.is_nested:
        _add(update, list(tensor.unbind()))
        return
    if is_lazy(tensor):
        update(b"uninitialised ")
        return
    if tensor.is_meta:
        raise ValueError(f"a tensor {tuple(tensor.shape)} is on the meta device and has no data")
    update(f"tensor {tensor.dtype} {tensor.layout} {tuple(tensor.shape)} ".encode())
    plain = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    plain = plain.resolve_conj().resolve_neg().cpu().contiguous()
    update(plain.reshape(-1).view(torch.uint8).numpy())


def _code(kind: type) -> str:
    """Return the source of a class, if it has one: the same weights in another forward make another model."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name.startswith("torch."):
        return name
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made by exec, or typed in
        return name

"""Checkpoints taken apart and put together again with right hashes, and the lies to tell in one."""

import hashlib
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsify
from sparsify import CheckpointError, CSRLinear

ITEM_SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "U64": 8,
    "U16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
}


class Net(nn.Module):
    """Small: every format and kind of layer, int8 values, a tied weight, a buffer, a scalar."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 6)
        self.csr, self.bits, self.masked = nn.Linear(60, 5), nn.Linear(6, 5), nn.Linear(5, 3, bias=False)
        self.full, self.head = nn.Linear(4, 3), nn.Linear(6, 7, bias=False)
        self.rounded = nn.Linear(6, 4)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.tensor(seed))


def source() -> Net:
    model = sparsify.convert(Net(), include=["csr", "bits", "masked", "full", "rounded"])
    for name, sparsity in {"csr": 0.97, "bits": 0.5, "masked": 0.4, "full": 0.0, "rounded": 0.5}.items():
        layer = model.get_submodule(name)
        layer.sparse_update(sparsity)
        if name != "masked":
            setattr(model, name, CSRLinear.from_sparse(layer, quantized=name == "rounded"))
    return model


class File:
    """A checkpoint taken apart; `bytes()` puts it together again with every hash and offset right."""

    def __init__(self, raw: bytes) -> None:
        (n,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + n])
        self.metadata: dict[str, Any] = entries.pop("__metadata__")
        self.header: Any = json.loads(self.metadata["sparsify"])
        data = raw[8 + n :]
        self.tensors: dict[str, tuple[str, list[int], bytes]] = {
            name: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for name, e in entries.items()
        }

    def hash_tensors(self) -> None:
        self.header["tensors"] = {
            name: hashlib.sha256(f"{dtype} {','.join(map(str, shape))} ".encode() + raw).hexdigest()
            for name, (dtype, shape, raw) in self.tensors.items()
        }

    def bytes(self, *, text: str | None = None, entries: Callable[[dict], object] | None = None) -> bytes:
        """text: this in place of our header. entries: a last change to the safetensors header."""
        text = json.dumps(self.header) if text is None else text
        metadata = {**self.metadata, "sparsify": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        table: dict[str, Any] = {"__metadata__": metadata}
        data = b""
        for name, (dtype, shape, raw) in self.tensors.items():
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        if entries is not None:
            entries(table)
        return with_table(json.dumps(table), data)


def with_table(table: str, data: bytes) -> bytes:
    encoded = table.encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + data


def contents(model: nn.Module) -> dict[str, Any]:
    """Return types and bits of everything."""
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    state = {
        name: (str(t.dtype), tuple(t.shape), bytes(t.detach().reshape(-1).view(torch.uint8).numpy()))
        for name, t in model.state_dict().items()
    }
    return {"types": types, "state": state}


class Reader:
    """Gives files to load and inspect, onto one model as long as that is untouched."""

    def __init__(self, path: Path) -> None:
        self.path, self.n_refused, self.n_loaded = path, 0, 0
        self.right = contents(source())
        self.fresh = Net(seed=1)
        self.before = contents(self.fresh)

    def try_load(self, raw: bytes, label: str) -> str | None:
        """Return the error's text, or None if exactly the right model was loaded; anything else fails."""
        self.path.write_bytes(raw)
        inspected = None
        try:
            sparsify.inspect(self.path)
        except CheckpointError as error:
            inspected = str(error)
        start = time.perf_counter()
        try:
            loaded = sparsify.load(self.path, self.fresh)
        except CheckpointError as error:
            return self._refused(str(error), label, time.perf_counter() - start)
        assert inspected is None, f"{label}: load takes what inspect refuses: {inspected}"
        assert contents(loaded) == self.right, f"{label}: loaded something else"
        assert loaded.head.weight is loaded.embedding.weight
        self.fresh = Net(seed=1)
        self.n_loaded += 1
        return None

    def _refused(self, message: str, label: str, seconds: float) -> str:
        self.n_refused += 1
        assert contents(self.fresh) == self.before, f"{label}: the model was touched"
        assert str(self.path) in message, label
        assert len(message) < 1000, f"{label}: a message of {len(message)} characters"
        assert seconds < 5, label
        return message


def i32(*values: int) -> tuple[str, list[int], bytes]:
    return "I32", [len(values)], struct.pack(f"<{len(values)}i", *values)


def f32(*values: float) -> tuple[str, list[int], bytes]:
    return "F32", [len(values)], struct.pack(f"<{len(values)}f", *values)


def u8(*values: int) -> tuple[str, list[int], bytes]:
    return "U8", [len(values)], bytes(values)


Lie = Callable[[File], object]


def tensor(name: str, change: Callable[[str, list[int], bytes], tuple[str, list[int], bytes]]) -> Lie:
    def lie(file: File) -> None:
        file.tensors[name] = change(*file.tensors[name])
        file.hash_tensors()

    return lie


def ints(name: str, change: Callable[[list[int]], list[int]]) -> Lie:
    def changed(dtype: str, shape: list[int], raw: bytes) -> tuple[str, list[int], bytes]:
        values = list(raw) if dtype == "U8" else list(struct.unpack(f"<{len(raw) // 4}i", raw))
        return (u8 if dtype == "U8" else i32)(*change(values))

    return tensor(name, changed)


def entry(layer: str, **changes: object) -> Lie:
    return lambda file: file.header["layers"][layer].update(changes)


def several(*lies: Lie) -> Lie:
    return lambda file: [lie(file) for lie in lies]


def rename(old: str, new: str) -> Lie:
    def lie(file: File) -> None:
        file.tensors[new] = file.tensors.pop(old)
        file.hash_tensors()

    return lie


def drop(name: str) -> Lie:
    def lie(file: File) -> None:
        del file.tensors[name]
        file.hash_tensors()

    return lie


def add(name: str, value: tuple[str, list[int], bytes]) -> Lie:
    def lie(file: File) -> None:
        file.tensors[name] = value
        file.hash_tensors()

    return lie


def header(key: str, value: object) -> Lie:
    return lambda file: file.header.update({key: value})


def crow_end(values: list[int], end: int) -> list[int]:
    return [*values[:-1], end]

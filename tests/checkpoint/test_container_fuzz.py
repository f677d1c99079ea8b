"""Thousands of damaged and lying files: each is refused with CheckpointError, or loads exactly the right thing.

Two kinds. Damage knows nothing of the format: flipped, cut, swapped bytes. A lie is a file written with care: the
safetensors header, our header and every hash are made to agree again, so that only the checks behind them can object.
"""

import gc
import hashlib
import json
import math
import random
import resource
import struct
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CheckpointError, CSRLinear, SparseLinear

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
    "BOOL": 1,
}


class Net(nn.Module):
    """Small: every format and kind of layer, a tied weight, a buffer, a scalar."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 6)
        self.csr, self.bits, self.masked = nn.Linear(60, 5), nn.Linear(6, 5), nn.Linear(5, 3, bias=False)
        self.full, self.head = nn.Linear(4, 3), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.tensor(seed))


def source() -> Net:
    model = sparsify.convert(Net(), include=["csr", "bits", "masked", "full"])
    for name, sparsity in {"csr": 0.97, "bits": 0.5, "masked": 0.4, "full": 0.0}.items():
        layer = model.get_submodule(name)
        layer.sparse_update(sparsity)
        if name != "masked":
            setattr(model, name, CSRLinear.from_sparse(layer))
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


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and wait for each other where a core is busy."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    sparsify.save(source(), path)
    assert {row.format for row in sparsify.inspect(path)} == {"csr", "bitmask", "dense"}
    return path.read_bytes()


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


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path / "file.safetensors")


def test_the_tools_of_this_file_are_right(good: bytes, reader: Reader) -> None:
    assert reader.try_load(good, "good") is None
    file = File(good)
    file.hash_tensors()
    assert file.header == File(good).header
    assert reader.try_load(file.bytes(), "put together again") is None


# Damage


def damaged(good: bytes, n: int, seed: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    for i in range(n):
        raw = bytearray(good)
        kind = rng.choice(
            ["bit", "bits", "byte", "cut", "cut front", "extend", "drop", "repeat", "swap", "zero", "header"]
        )
        at, other = rng.randrange(len(raw)), rng.randrange(len(raw))
        low, high = sorted((at, min(len(raw), at + rng.randrange(1, 64))))
        if kind == "bit":
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == "bits":
            for _ in range(rng.randrange(2, 20)):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            raw[at] = rng.randrange(256)
        elif kind == "cut":
            del raw[at:]
        elif kind == "cut front":
            del raw[: at + 1]
        elif kind == "extend":
            raw += rng.randbytes(rng.randrange(1, 100))
        elif kind == "drop":
            del raw[low:high]
        elif kind == "repeat":
            raw[low:low] = raw[low:high]
        elif kind == "swap":
            raw[at], raw[other] = raw[other], raw[at]
        elif kind == "zero":
            raw[low:high] = bytes(high - low)
        else:
            raw[:8] = struct.pack(
                "<Q", rng.choice([0, 1, 2**63, 2**64 - 1, len(raw), len(raw) - 8, rng.randrange(len(raw))])
            )
        yield f"{kind} at {at} (seed {seed}, number {i})", bytes(raw)


def test_damaged_files(good: bytes, reader: Reader) -> None:
    n = 3000
    same = 0
    for label, raw in damaged(good, n, seed=0):
        error = reader.try_load(raw, label)
        same += raw == good
        if error is None:  # then nothing but padding or the order of JSON keys can have changed
            assert len(raw) == len(good), label
    assert reader.n_refused + reader.n_loaded == n
    assert reader.n_refused > 0.95 * n
    assert reader.n_loaded - same < 30


def test_every_byte_of_the_data_and_every_cut(good: bytes, reader: Reader) -> None:
    start = 8 + struct.unpack("<Q", good[:8])[0]
    for at in range(start, len(good)):
        raw = bytearray(good)
        raw[at] ^= 0x10
        assert "was altered" in (reader.try_load(bytes(raw), f"byte {at}") or ""), at
    for end in range(0, len(good), 7):
        assert reader.try_load(good[:end], f"cut at {end}") is not None
    assert reader.n_refused > 800


# Lies


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


#: What is wrong, and a word that the error must hold. Every hash is right.
LIES: dict[str, tuple[Lie, str]] = {
    "row pointers start late": (ints("csr.weight.crow", lambda v: [1, *v[1:]]), "rise from 0"),
    "row pointers fall": (ints("csr.weight.crow", lambda v: [0, v[-1], 0, *v[3:]]), "rise from 0"),
    "row pointers end early": (ints("csr.weight.crow", lambda v: crow_end(v, v[-1] - 1)), "rise from 0"),
    "row pointers end late": (ints("csr.weight.crow", lambda v: crow_end(v, v[-1] + 1)), "rise from 0"),
    "row pointers end huge": (ints("csr.weight.crow", lambda v: crow_end(v, 2**31 - 1)), "rise from 0"),
    "row pointers negative": (ints("csr.weight.crow", lambda v: [0, -1, *v[2:]]), "rise from 0"),
    "row pointers too many": (ints("csr.weight.crow", lambda v: [*v, v[-1]]), "row pointers must be"),
    "no row pointers": (ints("csr.weight.crow", lambda v: []), "row pointers must be"),
    "row pointers of another dtype": (tensor("csr.weight.crow", lambda d, s, r: ("F32", s, r)), "row pointers must be"),
    "row pointers as a matrix": (tensor("csr.weight.crow", lambda d, s, r: (d, [2, 3], r)), "row pointers must be"),
    "column out of range": (ints("csr.weight.col", lambda v: [*v[:-1], 60]), "lie in"),
    "column 255": (ints("csr.weight.col", lambda v: [*v[:-1], 255]), "lie in"),
    "columns unsorted": (
        several(
            ints("csr.weight.crow", lambda v: [0, *[v[-1]] * 5]),
            ints("csr.weight.col", lambda v: [9, 8, *range(10, 8 + len(v))]),
        ),
        "strictly increasing",
    ),
    "a column twice": (
        several(
            ints("csr.weight.crow", lambda v: [0, *[v[-1]] * 5]),
            ints("csr.weight.col", lambda v: [9, 9, *range(10, 8 + len(v))]),
        ),
        "strictly increasing",
    ),
    "wide columns": (
        tensor("csr.weight.col", lambda d, s, r: ("I32", s, b"".join(struct.pack("<i", c) for c in r))),
        "column indices for 60 columns must be",
    ),
    "a value too few": (tensor("csr.weight.values", lambda d, s, r: (d, [s[0] - 1], r[:-4])), "one list each"),
    "values as integers": (tensor("csr.weight.values", lambda d, s, r: ("I32", s, r)), "one list each"),
    "values as booleans": (
        several(tensor("csr.weight.values", lambda d, s, r: ("BOOL", s, bytes(s[0])))),
        "one list each",
    ),
    "values in half precision": (
        tensor("csr.weight.values", lambda d, s, r: ("F16", s, r[: len(r) // 2])),
        "torch.float16",
    ),
    "values as a matrix": (tensor("csr.weight.values", lambda d, s, r: (d, [s[0], 1], r)), "one list each"),
    "a padding bit": (ints("bits.weight.bits", lambda v: [*v[:-1], v[-1] | 0x80]), "padding bits"),
    "a bit too many": (ints("bits.weight.bits", lambda v: [255, *v[1:]]), "bitmask keeps"),
    "no bits": (ints("bits.weight.bits", lambda v: [0] * len(v)), "bitmask keeps"),
    "a byte of bits too few": (ints("bits.weight.bits", lambda v: v[:-1]), "bitmask for"),
    "a byte of bits too many": (ints("bits.weight.bits", lambda v: [*v, 0]), "bitmask for"),
    "bits as booleans": (tensor("bits.weight.bits", lambda d, s, r: ("BOOL", s, bytes(len(r)))), "bitmask for"),
    "dense of another shape": (tensor("full.weight", lambda d, s, r: (d, [4, 3], r)), "dense weight must be"),
    "dense of integers": (tensor("full.weight", lambda d, s, r: ("I32", s, r)), "dense weight must be"),
    "more rows": (entry("csr", out_features=6), "csr"),
    "more columns": (entry("csr", in_features=61), "csr"),
    "in and out swapped": (entry("csr", out_features=60, in_features=5), "csr"),
    "a bitmask of another shape of one size": (entry("bits", out_features=6, in_features=5), "bits"),
    "negative size": (entry("csr", out_features=-1), "out_features"),
    "huge sizes": (entry("csr", out_features=2**31 - 1, in_features=2**31 - 1), "csr"),
    "a huge bitmask": (entry("bits", out_features=2**31 - 1, in_features=2**31 - 1), "bits"),
    "a huge dense weight": (entry("full", out_features=2**31 - 1, in_features=2**31 - 1), "full"),
    "sizes beyond all": (entry("csr", in_features=2**70), "in_features"),
    "sizes as text": (entry("csr", in_features="60"), "in_features"),
    "sizes as fractions": (entry("csr", in_features=60.5), "in_features"),
    "sizes as NaN": (entry("csr", in_features=math.nan), "in_features"),
    "sizes as infinity": (entry("csr", in_features=math.inf), "in_features"),
    "sizes as true": (entry("csr", in_features=True), "in_features"),
    "sizes missing": (lambda file: file.header["layers"]["csr"].pop("in_features"), "in_features"),
    "another format": (entry("csr", format="bitmask"), "csr.weight.bits"),
    "an unknown format": (entry("csr", format="ell"), "format"),
    "an unknown module": (entry("csr", module="Embedding"), "module"),
    "a path as a module": (entry("csr", module="os.system"), "module"),
    "another key": (entry("csr", more=1), "more"),
    "a layer as a list": (lambda file: file.header["layers"].update(csr=[1]), "csr"),
    "a layer that is none": (header("layers", {}), "another architecture"),
    "a layer of no name in the model": (
        lambda file: file.header["layers"].update(nothing=file.header["layers"].pop("csr")),
        "nothing",
    ),
    "a layer under a path": (
        lambda file: file.header["layers"].update({"../../etc/passwd": file.header["layers"].pop("csr")}),
        "passwd",
    ),
    "a layer that is an embedding": (
        several(
            lambda file: file.header["layers"].update(embedding=file.header["layers"].pop("csr")),
            *(rename(f"csr.weight.{part}", f"embedding.weight.{part}") for part in ("crow", "col", "values")),
        ),
        "Embedding",
    ),
    "the root as a layer": (
        several(
            lambda file: file.header["layers"].update({"": file.header["layers"].pop("csr")}),
            *(rename(f"csr.weight.{part}", f"weight.{part}") for part in ("crow", "col", "values")),
        ),
        "root",
    ),
    "a layer twice in the file": (
        lambda file: file.header["layers"].update({"csr.weight": file.header["layers"]["csr"]}),
        "csr.weight",
    ),
    "a tensor missing": (drop("csr.bias"), "csr.bias"),
    "a packed tensor missing": (drop("csr.weight.col"), "csr.weight.col"),
    "a tensor too many": (add("more", f32(1.0)), "more"),
    "a tensor that would be a mask": (add("masked.mask", u8(1)), "masked.mask"),
    "a dense weight beside the packed one": (add("csr.weight", ("F32", [5, 60], bytes(1200))), "csr.weight"),
    "the packed weight of a dense layer": (add("head.weight.crow", i32(0)), "head.weight.crow"),
    "a tensor under another name": (rename("csr.bias", "csr.bais"), "csr.bais"),
    "a tensor named like a path": (rename("csr.bias", "/etc/passwd"), "passwd"),
    "a tensor of no name": (rename("csr.bias", ""), "csr.bias"),
    "a tensor of another shape": (tensor("csr.bias", lambda d, s, r: (d, [1, 5], r)), "csr.bias"),
    "a tensor of another dtype": (tensor("csr.bias", lambda d, s, r: ("I32", s, r)), "csr.bias"),
    "a scalar as a list": (tensor("count", lambda d, s, r: (d, [1], r)), "count"),
    "an empty tensor of huge sizes": (tensor("csr.bias", lambda d, s, r: (d, [0, 2**62], b"")), ""),
    "a hash missing": (lambda file: file.header["tensors"].pop("csr.bias"), "csr.bias"),
    "a hash of nothing": (lambda file: file.header["tensors"].update(nothing="0" * 64), "nothing"),
    "a hash that is none": (lambda file: file.header["tensors"].update({"csr.bias": "abc"}), "csr.bias"),
    "a wrong hash": (lambda file: file.header["tensors"].update({"csr.bias": "0" * 64}), "altered"),
    "two tensors swapped": (
        lambda file: file.tensors.update(
            {"csr.bias": file.tensors["bits.bias"], "bits.bias": file.tensors["csr.bias"]}
        ),
        "altered",
    ),
    "an alias of nothing": (header("aliases", {"head.weight": "nothing"}), "nothing"),
    "an alias of itself": (header("aliases", {"head.weight": "head.weight"}), "head.weight"),
    "aliases in a loop": (header("aliases", {"head.weight": "x", "x": "head.weight"}), "cannot be"),
    "an alias of an alias": (header("aliases", {"head.weight": "embedding.weight", "x": "head.weight"}), "cannot be"),
    "an alias over a tensor": (header("aliases", {"csr.bias": "bits.bias"}), "csr.bias"),
    "an alias too many": (header("aliases", {"head.weight": "embedding.weight", "x": "count"}), "x"),
    "an alias of another shape": (header("aliases", {"head.weight": "csr.bias"}), "head.weight"),
    "an alias into a packed weight": (header("aliases", {"head.weight": "csr.weight.values"}), "csr.weight.values"),
    "an alias over a packed weight": (
        header("aliases", {"head.weight": "embedding.weight", "csr.weight": "count"}),
        "csr.weight",
    ),
    "no alias": (header("aliases", {}), "head.weight"),
    "aliases as a list": (header("aliases", []), "aliases"),
    "version 0": (header("version", 0), "version 0"),
    "version 2": (header("version", 2), "version 2"),
    "version -1": (header("version", -1), "version -1"),
    "a huge version": (header("version", 10**30), "version"),
    "a version as text": (header("version", "1"), "version"),
    "a version as true": (header("version", True), "version"),
    "a version as NaN": (header("version", math.nan), "version"),
    "no version": (lambda file: file.header.pop("version"), "version"),
    "more keys": (header("more", 1), "more"),
    "layers as null": (header("layers", None), "layers"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused(good: bytes, reader: Reader, name: str) -> None:
    lie, word = LIES[name]
    file = File(good)
    lie(file)
    raw = file.bytes()
    assert raw != good
    error = reader.try_load(raw, name)
    assert error is not None, "it was loaded"
    assert word in error


TEXTS = {
    "empty": "",
    "null": "null",
    "a list": "[1]",
    "a number": "1",
    "a string": '"a"',
    "no JSON": "{version: 1}",
    "two": "{} {}",
    "deep lists": '{"version": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep objects": '{"layers": ' + '{"a": ' * 100_000 + "1" + "}" * 100_000 + "}",
    "a number of a million digits": '{"version": ' + "9" * 1_000_000 + "}",
    "an exponent": '{"version": 1e999999999}',
    "NaN": '{"version": NaN, "layers": {}, "aliases": {}, "tensors": {}}',
    "a lone surrogate": '{"version": 1, "layers": {}, "aliases": {"\\ud800": "a"}, "tensors": {}}',
    "a zero byte": '{"version": 1, "layers": {}, "aliases": {"\\u0000": "a"}, "tensors": {}}',
    "a BOM": "\ufeff{}",
    "many keys": json.dumps(
        {"version": 1, "layers": {}, "tensors": {}, "aliases": {str(i): str(i) for i in range(50_000)}}
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_header_that_is_no_header_is_refused(good: bytes, reader: Reader, name: str) -> None:
    error = reader.try_load(File(good).bytes(text=TEXTS[name]), name)
    assert error is not None
    assert "header" in error or name == "many keys"


def test_keys_that_stand_twice_in_a_header_do_not_hide_anything(good: bytes, reader: Reader) -> None:
    file = File(good)
    text = json.dumps(file.header)
    twice = text.replace('"csr": {', '"csr": {"in_features": 9, ', 1)
    assert twice != text
    reader.try_load(file.bytes(text=twice), "twice")  # refused, or the last counts: then it is the right file
    table = json.loads(good[8 : 8 + struct.unpack("<Q", good[:8])[0]])
    encoded = json.dumps(table)
    for key in ("csr.bias", "__metadata__"):
        other = json.dumps({key: table["bits.bias" if key == "csr.bias" else key]})[1:-1]
        raw = with_table(encoded[:-1] + ", " + other + "}", good[-sum(len(t[2]) for t in file.tensors.values()) :])
        reader.try_load(raw, f"{key} twice")
    assert reader.n_refused + reader.n_loaded == 3


TABLES: dict[str, Callable[[dict], object]] = {
    "an offset beyond the end": lambda t: t["csr.bias"].update(data_offsets=[0, 2**40]),
    "offsets that fall": lambda t: t["csr.bias"].update(data_offsets=t["csr.bias"]["data_offsets"][::-1]),
    "negative offsets": lambda t: t["csr.bias"].update(data_offsets=[-20, 0]),
    "overlapping": lambda t: t["csr.bias"].update(data_offsets=t["bits.bias"]["data_offsets"]),
    "a shape too large for the bytes": lambda t: t["csr.bias"].update(shape=[6]),
    "a shape of 2^63": lambda t: t["csr.bias"].update(shape=[2**63]),
    "a shape whose product overflows": lambda t: t["csr.bias"].update(shape=[2**32, 2**32, 5]),
    "a negative shape": lambda t: t["csr.bias"].update(shape=[-5]),
    "a thousand sizes": lambda t: t["csr.bias"].update(shape=[1] * 1000 + [5]),
    "an unknown dtype": lambda t: t["csr.bias"].update(dtype="F33"),
    "a rare dtype": lambda t: t["csr.bias"].update(dtype="F8_E8M0", shape=[20]),
    "a dtype below a byte": lambda t: t["csr.bias"].update(dtype="F4", shape=[40]),
    "complex": lambda t: t["count"].update(dtype="C64"),
    "no metadata": lambda t: t.pop("__metadata__"),
    "metadata that is no text": lambda t: t["__metadata__"].update(sparsify={}),
    "no header": lambda t: t["__metadata__"].pop("sparsify"),
    "no hash": lambda t: t["__metadata__"].pop("sha256"),
    "a wrong hash": lambda t: t["__metadata__"].update(sha256="0" * 64),
    "an altered header": lambda t: t["__metadata__"].update(sparsify=t["__metadata__"]["sparsify"].replace("60", "61")),
    "a tensor less": lambda t: t.pop("csr.bias"),
    "a hole": lambda t: [
        e.update(data_offsets=[x + 8 for x in e["data_offsets"]]) for n, e in t.items() if n[0] != "_"
    ],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_lie_in_the_safetensors_header_is_refused(good: bytes, reader: Reader, name: str) -> None:
    raw = File(good).bytes(entries=TABLES[name])
    assert raw != File(good).bytes()
    assert reader.try_load(raw, name) is not None


def random_lies(file: File, rng: random.Random) -> None:
    """Change one to three things at random, and make all hashes right again."""
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(list(file.tensors))
        dtype, shape, raw = file.tensors[name]
        layer = rng.choice(list(file.header["layers"]))
        kind = rng.randrange(7)
        if kind == 0 and raw:
            changed = bytearray(raw)
            changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            file.tensors[name] = dtype, shape, bytes(changed)
        elif kind == 1:
            other = rng.choice([d for d, n in ITEM_SIZE.items() if n == ITEM_SIZE[dtype]])
            file.tensors[name] = other, shape, raw
        elif kind == 2:
            n, size = rng.randrange(20), ITEM_SIZE[dtype]
            file.tensors[name] = dtype, [n], (raw * 20)[: n * size] if len(raw) else bytes(n * size)
        elif kind == 3:
            file.tensors[name] = dtype, [*shape, 1], raw
        elif kind == 4:
            key = rng.choice(["in_features", "out_features"])
            file.header["layers"][layer][key] = rng.choice([0, 1, 5, 6, 59, 60, 61, 256, 65536, 2**31 - 1, -1])
        elif kind == 5:
            file.header["layers"][layer]["format"] = rng.choice(["csr", "bitmask", "dense"])
        else:
            file.header["aliases"][rng.choice(list(file.tensors))] = name
    file.hash_tensors()


def test_random_lies(good: bytes, tmp_path: Path) -> None:
    """Who can compute hashes can change values: what loads may be another model, but the one that the file says."""
    rng = random.Random(1)
    path = tmp_path / "lie.safetensors"
    n, n_loaded = 2000, 0
    fresh = Net(seed=1)
    before = contents(fresh)
    for number in range(n):
        file = File(good)
        random_lies(file, rng)
        path.write_bytes(file.bytes())
        try:
            loaded = sparsify.load(path, fresh)
        except CheckpointError:
            if number % 10 == 0:
                assert contents(fresh) == before, number
            continue
        n_loaded += 1
        assert_holds_the_file(loaded, file)
        fresh = Net(seed=1)
    assert contents(fresh) == before
    assert 50 < n_loaded < n / 2


def assert_holds_the_file(model: nn.Module, file: File) -> None:
    """Compare with what docs/formats.md says, worked out here with plain Python."""
    for name, entry in file.header["layers"].items():
        rows, columns = entry["out_features"], entry["in_features"]
        layer = model.get_submodule(name)
        layer = layer.to_sparse() if isinstance(layer, CSRLinear) else layer
        wanted = [0.0] * (rows * columns)
        if entry["format"] == "dense":
            wanted = floats(file.tensors[f"{name}.weight"])
        elif entry["format"] == "csr":
            crow = struct.unpack(f"<{rows + 1}i", file.tensors[f"{name}.weight.crow"][2])
            col, values = file.tensors[f"{name}.weight.col"][2], floats(file.tensors[f"{name}.weight.values"])
            for row in range(rows):
                for k in range(crow[row], crow[row + 1]):
                    wanted[row * columns + col[k]] = values[k]
        else:
            bits, values = file.tensors[f"{name}.weight.bits"][2], iter(floats(file.tensors[f"{name}.weight.values"]))
            wanted = [next(values) if bits[k // 8] >> (k % 8) & 1 else 0.0 for k in range(rows * columns)]
        assert isinstance(layer, SparseLinear)
        assert same(layer.weight, wanted), name


def floats(stored: tuple[str, list[int], bytes]) -> list[float]:
    assert stored[0] == "F32"
    return list(struct.unpack(f"<{len(stored[2]) // 4}f", stored[2]))


def same(found: Tensor, wanted: list[float]) -> bool:
    return torch.equal(found.detach().reshape(-1).view(torch.int32), torch.tensor(wanted).view(torch.int32))


# Memory


def test_a_small_file_with_huge_sizes_takes_no_memory(good: bytes, reader: Reader) -> None:
    huge = [name for name in LIES if "huge" in name or "beyond" in name]
    assert len(huge) >= 5
    tracemalloc.start()
    try:
        base = peak_rss()
        for name in huge:
            file = File(good)
            LIES[name][0](file)
            assert reader.try_load(file.bytes(), name) is not None
        assert tracemalloc.get_traced_memory()[1] < 20e6
        assert peak_rss() - base < 100e6
    finally:
        tracemalloc.stop()


def test_a_bitmask_of_a_layer_that_the_model_has_not_is_not_unpacked(good: bytes, tmp_path: Path) -> None:
    """8 MB of zero bits stand for 256 MB of dense weights; load and inspect stay near the size of the file."""
    file = File(good)
    rows, columns = 1 << 13, 1 << 13
    file.header["layers"]["bits"].update(out_features=rows, in_features=columns)
    file.tensors["bits.weight.bits"] = ("U8", [rows * columns // 8], bytes(rows * columns // 8))
    file.tensors["bits.weight.values"] = ("F64", [0], b"")
    file.hash_tensors()
    path = tmp_path / "zeros.safetensors"
    path.write_bytes(file.bytes())

    def load(path: Path) -> None:
        with pytest.raises(CheckpointError, match="another architecture"):
            sparsify.load(path, Net())

    for call in (sparsify.inspect, load):
        gc.collect()
        grown = growth(lambda call=call: call(path))
        assert grown < 25 * path.stat().st_size, f"{grown / 1e6:.0f} MB"


def large(out_features: int, in_features: int, format: str) -> Lie:
    """Say that layer `bits` is huge, without a kept weight."""
    columns = "U8" if in_features <= 256 else "U16" if in_features <= 65536 else "I32"
    if format == "csr":
        parts = {"crow": i32(*[0] * (out_features + 1)), "col": (columns, [0], b"")}
    else:
        parts = {"bits": u8(*bytes(-(-out_features * in_features // 8)))}

    def lie(file: File) -> None:
        for name in [name for name in file.tensors if name.startswith("bits.weight.")]:
            del file.tensors[name]
        file.header["layers"]["bits"].update(out_features=out_features, in_features=in_features, format=format)
        for part, stored in {**parts, "values": f32()}.items():
            file.tensors[f"bits.weight.{part}"] = stored

    return lie


#: Files of a few KB, each with all hashes right, whose weights would take GB if they were unpacked.
LARGE: dict[str, Lie] = {
    "a wide row": large(1, 2**28, "csr"),
    "the widest rows": large(4, 2**31 - 1, "csr"),
    "rows without columns": large(2**31 - 1, 0, "bitmask"),
    "columns without rows": large(0, 2**31 - 1, "bitmask"),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("n_aliases", [0, 1, 300])
def test_a_small_file_of_large_weights_is_not_unpacked(good: bytes, tmp_path: Path, name: str, n_aliases: int) -> None:
    file = File(good)
    LARGE[name](file)
    file.header["aliases"] |= {f"alias {number}": "bits.weight" for number in range(n_aliases)}
    file.hash_tensors()
    path = tmp_path / "large"
    path.write_bytes(file.bytes())

    def load() -> None:
        with pytest.raises(CheckpointError, match="another architecture"):
            sparsify.load(path, Net())

    for call in (lambda: sparsify.inspect(path), load):
        gc.collect()
        assert growth(call) < 20e6


@pytest.mark.parametrize("key", ["layers", "aliases", "choices", "tensors"])
def test_names_of_any_length_make_no_long_message(good: bytes, reader: Reader, key: str) -> None:
    file = File(good)
    value = {"aliases": "csr.bias", "tensors": "0" * 64}.get(key, {})
    file.header[key] |= {f"{number}{'x' * 100_000}": value for number in range(4)}
    assert reader.try_load(file.bytes(), key) is not None


def test_many_names_of_a_layer_of_the_models_own_shape_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "aliases"
    sparsify.save(sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(1024, 1024, bias=False))), 1.0), path)
    file = File(path.read_bytes())
    file.header["aliases"] = {f"alias {number}": "0.weight" for number in range(1000)}
    path.write_bytes(file.bytes())

    def load() -> None:
        with pytest.raises(CheckpointError, match=r"another architecture: .* 1000 too many"):
            sparsify.load(path, nn.Sequential(nn.Linear(1024, 1024, bias=False)))

    for call in (lambda: sparsify.inspect(path), load):
        gc.collect()
        assert growth(call) < 50e6  # 1000 dense weights would be 4 GB


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth(run: Callable[[], object]) -> int:
    """Return how much the resident memory grew at most while `run` ran, sampled every millisecond."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    if not Path("/proc/self/statm").exists():
        pytest.skip("the resident memory is read from /proc, which this system lacks")
    base, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return most - base

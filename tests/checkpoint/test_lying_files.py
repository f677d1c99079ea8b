"""Files written with care to deceive: with every hash right, only the checks behind the hashes can object."""

import json
import math
import resource
import struct
import sys
import tracemalloc
from collections.abc import Callable

import pytest
from forged_files import (
    File,
    Lie,
    Reader,
    add,
    crow_end,
    drop,
    entry,
    f32,
    header,
    i32,
    ints,
    rename,
    several,
    tensor,
    u8,
    with_table,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
    "dense of integers": (tensor("full.weight", lambda d, s, r: ("I32", s, r)), "must be floating"),
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
    "an unknown module": (entry("csr", module="Embeddings"), "module"),
    "an Embedding of floats": (entry("csr", module="Embedding"), "int8 rows"),
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
    "version 3": (header("version", 3), "version 3"),
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


@pytest.mark.parametrize("key", ["layers", "aliases", "choices", "tensors"])
def test_names_of_any_length_make_no_long_message(good: bytes, reader: Reader, key: str) -> None:
    file = File(good)
    value = {"aliases": "csr.bias", "tensors": "0" * 64}.get(key, {})
    file.header[key] |= {f"{number}{'x' * 100_000}": value for number in range(4)}
    assert reader.try_load(file.bytes(), key) is not None


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Thousands of files damaged at random: each is refused with CheckpointError, or loads exactly the right thing.

Damage knows nothing of the format: flipped, cut, swapped bytes. Random lies change the header, and keep all hashes
right.
"""

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forged_files import ITEM_SIZE, File, Net, Reader, contents
from torch import Tensor, nn

import sparsify
from sparsify import CheckpointError, CSRLinear, SparseLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_tools_of_this_file_are_right(good: bytes, reader: Reader) -> None:
    assert reader.try_load(good, "good") is None
    file = File(good)
    file.hash_tensors()
    assert file.header == File(good).header
    assert reader.try_load(file.bytes(), "put together again") is None


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


def random_lies(file: File, rng: random.Random) -> None:
    """Change one to three things at random, and make all hashes right again."""
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(list(file.tensors))
        dtype, shape, raw = file.tensors[name]
        layer = rng.choice(list(file.header["layers"]))
        kind = rng.randrange(8)
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
        elif kind == 6:
            file.header["layers"][layer]["dequantized"] = rng.choice(["", "F32", "F16", "I8"])
        else:
            file.header["aliases"][rng.choice(list(file.tensors))] = name
    file.hash_tensors()


def test_random_lies(good: bytes, tmp_path: Path) -> None:
    """With all hashes right, a file may hold another model: then exactly that model is loaded."""
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
        if entry.get("dequantized"):
            scale = floats(file.tensors[f"{name}.weight.scale"])
            wanted = [float(torch.tensor(w) * torch.tensor(scale[k // columns])) for k, w in enumerate(wanted)]
        assert isinstance(layer, SparseLinear)
        assert same(layer.weight, wanted), name


def floats(stored: tuple[str, list[int], bytes]) -> list[float]:
    if stored[0] == "I8":
        return [float(value) for value in struct.unpack(f"<{len(stored[2])}b", stored[2])]
    assert stored[0] == "F32"
    return list(struct.unpack(f"<{len(stored[2]) // 4}f", stored[2]))


def same(found: Tensor, wanted: list[float]) -> bool:
    return torch.equal(found.detach().reshape(-1).view(torch.int32), torch.tensor(wanted).view(torch.int32))

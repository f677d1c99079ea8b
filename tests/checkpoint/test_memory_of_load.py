"""A small file of large weights is refused without unpacking a weight: memory stays near the size of the file."""

import gc
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from forged_files import (
    File,
    Lie,
    Net,
    f32,
    i32,
    u8,
)
from torch import nn

import sparsify
from sparsify import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


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
    """Make layer `bits` huge, without a kept weight."""
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

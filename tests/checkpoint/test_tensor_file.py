"""A safetensors file that another program changes while it is read: the old file, the new one, or an error."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import sparsify
from sparsify import CheckpointError
from sparsify.checkpoint import container
from sparsify.checkpoint.tensor_file import DTYPES, TensorFile, open_unchanged
from sparsify.offload.lazy_safetensors import LazySafetensors


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: torch.full((1000,), value) for name in "abc"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    safetensors.torch.save_file(tensors(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_every_dtype_is_read_as_safetensors_wrote_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (3,), (2, 5), (0, 7), (1, 2, 3)]
    made = {
        f"{dtype} {shape}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype in DTYPES
        for shape in shapes
    }
    safetensors.torch.save_file(made, tmp_path / "a.safetensors", {"note": "text"})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert (set(file), file.metadata) == (set(made), {"note": "text"})
        for name, tensor in made.items():
            read = file.read(name)
            assert (file.dtype(name), file.shape(name)) == (tensor.dtype, tuple(tensor.shape))
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_a_tensor_is_on_the_cpu_whatever_the_default_device(path: Path) -> None:
    with torch.device("meta"), TensorFile(path) as file:
        assert file.read("a").tolist() == [1.0] * 1000


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    """Write other values into the same file, of the same size."""
    safetensors.torch.save_file(tensors(2), path.with_name("new"))
    shutil.copyfile(path.with_name("new"), path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # the clock of some systems stands still for milliseconds


def replace(path: Path) -> None:
    safetensors.torch.save_file(tensors(2), path.with_name("new"))
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("change", [cut, rewrite, lambda path: path.write_bytes(path.read_bytes() + b"more")])
def test_a_file_that_is_changed_in_place_is_an_error(path: Path, change: Callable[[Path], Any]) -> None:
    with TensorFile(path) as file:
        file.read("a")
        change(path)
        for name in "abc":
            with pytest.raises(CheckpointError, match=r"a\.safetensors: another program changed it"):
                file.read(name)


@pytest.mark.parametrize("change", [replace, Path.unlink])
def test_a_file_that_is_replaced_is_still_the_old_one(path: Path, change: Callable[[Path], Any]) -> None:
    with TensorFile(path) as file:
        first = file.read("a")
        change(path)
        assert not file.is_at(path)
        assert [tensor.unique().tolist() for tensor in (first, file.read("b"), file.read("c"))] == [[1.0]] * 3


def test_weights_that_stream_are_those_that_were_opened(path: Path) -> None:
    weights = LazySafetensors(path)
    replace(path)
    assert {float(weights.read(name).mean()) for name in "abc"} == {1.0}
    weights = LazySafetensors(path)
    cut(path)
    with pytest.raises(ValueError, match="another program changed it"):
        weights.read("c")


def test_a_folder_saved_anew_while_it_is_opened_is_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        safetensors.torch.save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    LazySafetensors(tmp_path)
    check = TensorFile._check_places
    monkeypatch.setattr(TensorFile, "_check_places", lambda self: (check(self), replace(Path(self.path))))
    with pytest.raises(ValueError, match="another program replaced it"):
        LazySafetensors(tmp_path)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a", "", ".", 3, None])
def test_an_index_names_files_beside_it(path: Path, name: object) -> None:
    (path.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="which is no name of a file beside it"):
        LazySafetensors(path.parent)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000])
def test_an_index_that_is_none_is_named(path: Path, text: str) -> None:
    (path.parent / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: not an index of weights"):
        LazySafetensors(path.parent)


def test_a_checkpoint_cut_or_saved_anew_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint has hashes besides, so that not even a change within the clock's tick goes unnoticed."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), 0.5)

    path, other = tmp_path / "a", tmp_path / "b"
    sparsify.save(model(1), other)
    sparsify.save(model(0), path)
    good, read, n_tensors = path.read_bytes(), container.read_tensor, len(container.read(path)[1])
    now = {"cut": lambda: os.truncate(path, 4096), "rewrite": lambda: path.write_bytes(other.read_bytes())}
    now["replace"] = lambda: os.replace(shutil.copyfile(other, tmp_path / "c"), path)
    for kind, change in now.items():
        for moment in range(n_tensors):
            path.write_bytes(good)
            count = iter(range(100))

            def changed(*args: Any, change: Any = change, moment: int = moment, count: Any = count) -> torch.Tensor:
                if next(count) == moment:
                    change()
                return read(*args)

            monkeypatch.setattr(container, "read_tensor", changed)
            if kind == "replace":
                loaded = sparsify.load(path, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
                assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model(0).parameters(), strict=True))
            else:
                with pytest.raises(CheckpointError, match=r"another program changed it|was altered"):
                    sparsify.load(path, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))


def test_any_file_can_be_watched_while_it_is_read(path: Path) -> None:
    with open_unchanged(path) as file:
        assert file.read() == path.read_bytes()

    def changed() -> None:
        with open_unchanged(path):
            cut(path)

    with pytest.raises(CheckpointError, match="another program changed it"):
        changed()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: None, FileNotFoundError, "there is no file"),
        (Path.mkdir, IsADirectoryError, "is a folder"),
        (os.mkfifo, OSError, "is a device or a pipe"),  # and is not waited for
    ],
)
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], Any], error: type[OSError], words: str) -> None:
    make(tmp_path / "odd")
    with pytest.raises(error, match=words):
        TensorFile(tmp_path / "odd")


def with_header(entries: object, n_bytes: int = 4) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


def one(**changes: object) -> bytes:
    return with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}})


WRONG = {
    "empty": (b"", "it has 0 bytes"),
    "a header of no size": (struct.pack("<Q", 2**63), "its header is to have"),
    "no JSON": (struct.pack("<Q", 4) + b"{{{{", "its header is wrong"),
    "deep JSON": (struct.pack("<Q", 100_000) + b"[" * 100_000, "its header is wrong"),
    "a list": (with_header([]), "its header is wrong"),
    "an unknown dtype": (one(dtype="F33"), "dtype 'F33'"),
    "complex": (one(dtype="C64"), "dtype 'C64'"),
    "a float as size": (one(shape=[1.0]), "shape"),
    "a text as size": (one(shape=["1"]), "shape"),
    "a negative size": (one(shape=[-1]), "shape"),
    "many sizes": (one(shape=[1] * 65), "shape"),
    "sizes beyond any memory": (one(shape=[0, 2**62, 2**62]), "impossible shape"),
    "another number of bytes": (one(shape=[2]), "8 bytes"),
    "a third offset": (one(data_offsets=[0, 4, 4]), "data_offsets"),
    "falling offsets": (one(data_offsets=[4, 0]), "lies at 4 to 0"),
    "a hole": (one(data_offsets=[1, 5]), "lies at 1 to 5"),
    "an unknown key": (one(more=1), "more"),
    "bytes too many": (with_header({}, 5), "take 0 bytes"),
    "metadata that is no text": (with_header({"__metadata__": {"a": 1}}, 0), "__metadata__"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_is_wrong(tmp_path: Path, name: str) -> None:
    raw, words = WRONG[name]
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file \(.*" + words):
        TensorFile(tmp_path / "a")


def test_a_bool_is_zero_or_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(
        with_header({"a": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}, 0) + b"\0\1\1\2"
    )
    with TensorFile(tmp_path / "a") as file, pytest.raises(CheckpointError, match="neither 0 nor 1"):
        file.read("a")

"""A good file, and a reader of forged ones."""

from pathlib import Path

import pytest
from forged_files import Reader, source

import sparsify


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    sparsify.save(source(), path)
    assert {row.format for row in sparsify.inspect(path)} == {"csr", "bitmask", "dense"}
    return path.read_bytes()


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path / "file.safetensors")

"""A good file, and a reader of forged ones."""

from pathlib import Path

import pytest
from forged_files import Reader, source

import sparsify


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let exports leave most of a small model dense, in the tests of files: it is not what they are about."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::sparsify.errors.LeftDenseWarning"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    sparsify.save(source(), path)
    assert {row.format for row in sparsify.inspect(path)} == {"csr", "bitmask", "dense"}
    return path.read_bytes()


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path / "file.safetensors")

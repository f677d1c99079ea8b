"""The memory that a computation may still take."""

from pathlib import Path

import pytest
import torch

from sparsify.hardware import free_memory
from sparsify.hardware.free_memory import free_bytes

CPU = torch.device("cpu")


def test_some_memory_is_free() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50


def test_what_the_system_calls_available_counts(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       24689364 kB\nMemFree:         1000 kB\nMemAvailable:    2000 kB\n")
    assert free_memory._available(file) == 2000 * 1024
    file.write_text("MemTotal:       24689364 kB\n")
    assert free_memory._available(file) is None
    assert free_memory._available(tmp_path / "none") is None


@pytest.mark.parametrize(("limit", "used", "left"), [("5000", "1000", 4000), ("5000", "6000", 0), ("max", "7", None)])
def test_the_limit_of_a_container_counts(tmp_path: Path, limit: str, used: str, left: int | None) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    assert free_memory._left_in_group(tmp_path) == left
    assert free_memory._left_in_group(tmp_path / "none") is None


def test_the_least_of_both_is_free_and_a_guess_where_neither_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_memory, "_GROUP", tmp_path)
    monkeypatch.setattr(free_memory, "_available", lambda file: None)
    assert free_bytes(CPU) == 4 * 2**30
    (tmp_path / "memory.max").write_text("5000")
    (tmp_path / "memory.current").write_text("1000")
    assert free_bytes(CPU) == 4000
    monkeypatch.setattr(free_memory, "_available", lambda file: 3000)
    assert free_bytes(CPU) == 3000

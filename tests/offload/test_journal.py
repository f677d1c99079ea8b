"""A journal holds what one run has finished: under any names, by one process at a time, and not altered since."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify.errors import CheckpointError
from sparsify.layers import MaskedLayer
from sparsify.layers.records import LayerResult
from sparsify.offload.journal import Journal, check_unused

ABOUT = {"recipe": "wanda", "weights": "0123"}

HOLD = """
import fcntl, sys
with open(sys.argv[1], "ab") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def finished(seed: int = 0) -> MaskedLayer:
    torch.manual_seed(seed)
    layer = sparsify.prune(sparsify.convert(nn.Linear(8, 4)), 0.5)
    layer.pruning_result = LayerResult(0.25, 1.5)
    return layer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The journal of a run that was stopped after two layers."""
    journal = Journal(tmp_path / "run", ABOUT)
    for number in range(2):
        journal.write({f"blocks.{number}": finished(number)})
    journal.close()
    return journal.folder


@contextlib.contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the journal's list locked, as a run does."""
    command = [sys.executable, "-c", HOLD, str(folder / "finished.jsonl")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_what_is_finished_comes_back_as_it_was(folder: Path) -> None:
    journal = Journal(folder, ABOUT)
    assert ("blocks.0" in journal, "blocks.1" in journal, "blocks.2" in journal) == (True, True, False)
    for number in range(2):
        layer, expected = sparsify.convert(nn.Linear(8, 4)), finished(number)
        journal.take_over(f"blocks.{number}", layer)
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.mask, expected.mask)
        assert layer.pruning_result == LayerResult(0.25, 1.5)


def test_a_journal_of_another_run_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"another recipe \(wanda, now sparsegpt\); give the same, or delete"):
        Journal(folder, {**ABOUT, "recipe": "sparsegpt"})
    with pytest.raises(ValueError, match=r"another torch \(None, now 2\)"):
        Journal(folder, {**ABOUT, "torch": "2"})
    with pytest.raises(ValueError, match=r"another weights \(0123, now None\)"):
        Journal(folder, {"recipe": "wanda"})
    (folder / "run.json").write_text(json.dumps(ABOUT))  # as a run of the first layout wrote it
    with pytest.raises(ValueError, match=r"another journal \(None, now 3\)"):
        Journal(folder, ABOUT)
    with pytest.raises(ValueError, match="go on with --resume, or delete it"):
        check_unused(folder, resume=False)
    check_unused(folder, resume=True)


NAMES = ["plain.0", "", "(root)", "a/b", "A/b", "../up", "..", "/absolute", "a", "A", "x" * 300, "y" * 300, "x" * 299]
NAMES += ["run", "run.json", "finished", "con\n", "é", "e\u0301", "\udc80", ".hidden", "a..b", "a-b"]


def test_names_are_no_paths(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run", ABOUT)
    layer = finished()
    for name in NAMES:
        journal.write({name: layer})
    assert list(tmp_path.iterdir()) == [journal.folder]
    files = [file.name for file in journal.folder.iterdir()]
    assert len({name.lower() for name in files}) == len(files) == len(NAMES) + 2
    assert all(file.is_file() for file in journal.folder.iterdir())
    assert max(map(len, files)) < 150
    assert "plain.0.safetensors" in files
    again = Journal(journal.folder, ABOUT)
    for name in NAMES:
        assert name in again
        assert torch.equal(again.read(name)[1]["bias"], layer.bias)
    again.delete()
    assert not list(tmp_path.iterdir())


def swap(folder: Path) -> None:
    one, other = (folder / f"blocks.{number}.safetensors" for number in range(2))
    one.rename(folder / "between")
    other.rename(one)
    (folder / "between").rename(other)


def flip(folder: Path) -> None:
    file = folder / "blocks.1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")


ALTERED = {
    "two swapped": swap,
    "another layer, whole": lambda folder: sparsify.save(finished(7), folder / "blocks.0.safetensors"),
    "another model, whole": lambda folder: sparsify.save(nn.Sequential(finished(0)), folder / "blocks.0.safetensors"),
    "a flipped bit": flip,
    "cut": lambda folder: os.truncate(folder / "blocks.0.safetensors", 100),
    "another hash": lambda folder: (folder / "finished.jsonl").write_text(
        (folder / "finished.jsonl").read_text().replace('"sha256": "', '"sha256": "0')
    ),
    "no list": lambda folder: (folder / "finished.jsonl").write_text("[]\n"),
    "a list with less": lambda folder: (folder / "finished.jsonl").write_text('{"layers": [{"layer": "blocks.0"}]}\n'),
}


@pytest.mark.parametrize("how", ALTERED)
def test_what_was_altered_is_refused_before_it_is_used(folder: Path, how: str) -> None:
    opened = Journal(folder, ABOUT)
    ALTERED[how](folder)
    with pytest.raises(CheckpointError, match=r"run.(blocks\.[01]\.safetensors|finished\.jsonl): "):
        Journal(folder, ABOUT)
    if "list" not in how and "hash" not in how:
        with pytest.raises(CheckpointError):
            [opened.read(f"blocks.{number}") for number in range(2)]


def test_a_layer_whose_file_is_gone_is_pruned_anew(folder: Path) -> None:
    (folder / "blocks.0.safetensors").unlink()
    journal = Journal(folder, ABOUT)
    assert ("blocks.0" in journal, "blocks.1" in journal) == (False, True)


def test_a_line_that_a_crash_has_cut_is_left_out(folder: Path) -> None:
    whole = (folder / "finished.jsonl").read_bytes()
    (folder / "finished.jsonl").write_bytes(whole[:-5])
    journal = Journal(folder, ABOUT)
    assert ("blocks.0" in journal, "blocks.1" in journal) == (True, False)
    journal.write({"blocks.1": finished(1)})
    assert (folder / "finished.jsonl").read_bytes() == whole


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (folder / "blocks.2.safetensors").symlink_to(tmp_path / "mine")
    Journal(folder, ABOUT).write({"blocks.2": finished()})
    assert (tmp_path / "mine").read_text() == "mine"
    (folder / "finished.jsonl").unlink()
    (folder / "finished.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        Journal(folder, ABOUT)


def test_the_second_run_at_once_is_told(folder: Path) -> None:
    with another_run(folder) as other:
        for _ in range(2):
            with pytest.raises(BlockingIOError, match="another run is at work there; wait until it has ended"):
                Journal(folder, ABOUT)
            with pytest.raises(BlockingIOError, match="another run is at work"):
                check_unused(folder, resume=False)
        other.kill()
        other.wait()
        journal = Journal(folder, ABOUT)
    journal.write({"blocks.2": finished()})
    journal.read("blocks.0")
    with pytest.raises(AssertionError), another_run(folder):
        pass
    journal.close()
    with another_run(folder):
        pass


def test_files_of_others_stay(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / ".sparsify-0123456789abcdef.tmp").write_text("half of a file")
    journal = Journal(folder, ABOUT)
    with pytest.warns(UserWarning, match=r"run: kept for 'notes.txt', which the run did not write"):
        journal.delete()
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"a folder with other files in it \('notes.txt'\)"):
        Journal(folder, ABOUT)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
    shutil.rmtree(folder)
    folder.write_text("mine")
    with pytest.raises(FileExistsError, match="in a folder of this name; move it"):
        Journal(folder, ABOUT)
    assert folder.read_text() == "mine"


def test_a_run_that_is_over_says_so_until_its_files_are_gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(folder, ABOUT)
    assert journal.result is None
    journal.conclude({"rows": [1]})
    unlink, n_left = os.unlink, 1

    def killing(path: os.PathLike[str]) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise KeyboardInterrupt
        unlink(path)

    monkeypatch.setattr(os, "unlink", killing)
    for _ in range(3):  # each deletes one more: two layers, and what the run was to do
        journal, n_left = Journal(folder, ABOUT), 1
        assert journal.result == {"rows": [1]}
        with pytest.raises(ValueError, match="another recipe"):
            Journal(folder, {**ABOUT, "recipe": "sparsegpt"})
        with pytest.raises(KeyboardInterrupt):
            journal.delete()
    journal, n_left = Journal(folder, ABOUT), 100
    assert journal.result == {"rows": [1]}
    journal.delete()
    assert not folder.exists()

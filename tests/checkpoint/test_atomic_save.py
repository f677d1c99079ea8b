"""Writing is all or nothing: a failed save leaves the old file whole, and no other behind."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from saved_models import Net, masked, saved
from torch import nn

import sparsify


def folder(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "sparsify.checkpoint.container._safetensors_header"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, error: BaseException
) -> None:
    saved(tmp_path)
    before = folder(tmp_path)

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(broken, fail)
    with pytest.raises(type(error)):
        saved(tmp_path, sparsify.export(masked(seed=3), format="csr"))
    assert folder(tmp_path) == before


FULL_DISK = """
import resource, sys, sparsify
from torch import nn
model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(100, 100))), 0.5)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    sparsify.save(model, sys.argv[1])
except OSError as error:
    print("OSError", error.errno)
"""


def test_a_disk_that_fills_up_is_an_os_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = folder(tmp_path)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", str(errno.EFBIG)], done.stderr
    assert folder(tmp_path) == before


def test_a_refused_model_leaves_the_old_file(tmp_path: Path) -> None:
    saved(tmp_path)
    before = folder(tmp_path)
    with pytest.raises(ValueError, match="meta"):
        saved(tmp_path, nn.Conv1d(1, 1, 1, device="meta"))
    assert folder(tmp_path) == before


WRITER = """
import sys, torch, sparsify
from torch import nn
torch.manual_seed(0)
model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(1024, 1024))), 0.5)
print("ready", flush=True)
while True:
    sparsify.save(model, sys.argv[1])
    print("saved", flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(1)
    old = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(1024, 1024))), 0.5)
    sparsify.save(old, path)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30  # wait for the temporary file: the writer is in the middle of it
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            pass
        writer.send_signal(signal.SIGKILL)
    sparsify.load(path, nn.Sequential(nn.Linear(1024, 1024)))  # old or new, but whole
    leftovers = [found.name for found in tmp_path.iterdir() if found != path]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in leftovers)
    sparsify.save(old, path)  # and leftovers are in nobody's way
    sparsify.load(path, nn.Sequential(nn.Linear(1024, 1024)))


def test_save_into_a_missing_folder_or_onto_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        sparsify.save(masked(), tmp_path / "nowhere" / "model.safetensors")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        sparsify.save(masked(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_save_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    sparsify.save(masked(), link)
    assert link.is_symlink()
    sparsify.load(target, Net(seed=9))


def test_save_onto_a_pipe_is_refused_as_load_refuses_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"cannot save to .*pipe: it is a pipe"):
        sparsify.save(masked(), tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_new_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    mode = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert stat.S_IMODE(saved(tmp_path).stat().st_mode) == mode

"""An output that cannot be written is noticed before the work that would fill it."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from sparsify.outputs import check_space, check_writable


def test_a_folder_that_takes_files_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old.safetensors").write_text("old")
    check_writable(tmp_path / "old.safetensors")
    check_writable(tmp_path / "new.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["old.safetensors"]
    assert (tmp_path / "old.safetensors").read_text() == "old"


def test_a_place_that_takes_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"--out .*there is no folder .*nowhere"):
        check_writable(tmp_path / "nowhere/x", "--out ")
    with pytest.raises(IsADirectoryError, match="it is a folder; name a file in it"):
        check_writable(tmp_path)
    with pytest.raises(OSError, match="no file can be written in /proc"):  # not even by root
        check_writable("/proc/x")

    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"no file can be written in .* \(Read-only file system\)"):
        check_writable(tmp_path / "x")


def test_a_disk_that_is_too_full_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 10**9))
    check_space(tmp_path, 2 * 10**9)
    with pytest.raises(OSError, match=r"--out .*: 2.5 GB are needed there and 2 GB are free"):
        check_space(tmp_path, 25 * 10**8, "--out ")

    def silent(_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(shutil, "disk_usage", silent)
    check_space(tmp_path, 10**18)

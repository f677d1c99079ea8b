"""An output that cannot be written is noticed before the work that would fill it; one that fails destroys nothing."""

import errno
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.outputs import check_space, check_writable, new_file, write_text


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


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # of an absolute one there would be too many letters


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": make_device,
    "link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    SPECIAL[kind](tmp_path / "special")
    before = {file.name: file.lstat().st_mode for file in tmp_path.iterdir()}
    with pytest.raises(OSError, match=f"--out .*({kind.split()[-1]}, which a file would replace|symbolic links)"):
        check_writable(tmp_path / "special", "--out ")
    with pytest.raises(OSError, match=r"--out .*special"):
        write_text(tmp_path / "special", "new", "--out ")
    assert {file.name: file.lstat().st_mode for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_a_new_file_has_the_mode_of_the_old_one(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    with new_file(path) as file:
        file.write(b"new")
        (temporary,) = set(tmp_path.iterdir()) - {path}
        assert stat.S_IMODE(temporary.stat().st_mode) == mode
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)


def test_a_file_that_may_not_be_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o444)
    if os.access(path, os.W_OK):  # root may: the mode stays
        write_text(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
        path.write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="it is read-only; make it writable"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_a_new_file_has_the_owner_of_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    if os.getuid() == 0:
        os.chown(path, 4321, 1234)
        write_text(path, "new")
        assert (path.read_text(), path.stat().st_uid, path.stat().st_gid) == ("new", 4321, 1234)
    else:
        monkeypatch.setattr(Path, "stat", lambda *_: os.stat("/"))

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    before = os.stat(path), path.read_bytes()
    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(PermissionError, match=r"it belongs to user .* delete it first, or name another file"):
        write_text(path, "newer")
    assert (os.stat(path), path.read_bytes()) == before
    assert os.listdir(tmp_path) == ["file"]


def test_extended_attributes_stay(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    try:
        os.setxattr(path, "user.note", b"mine")
    except (AttributeError, OSError):
        pytest.skip("no extended attributes here")
    write_text(path, "new")
    assert os.getxattr(path, "user.note") == b"mine"


def test_links_stay_and_what_they_mean_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("folder/new")
    (tmp_path / "chain").symlink_to("dangling")
    write_text(tmp_path / "chain", "text")
    assert (tmp_path / "folder/new").read_text() == "text"
    assert (tmp_path / "chain").is_symlink()
    assert (tmp_path / "dangling").is_symlink()


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / ("name" * 63)  # as long as a name may be
    path.write_text("old")

    def half() -> None:
        with new_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", [path.name])

"""Output files: checked before the work for them, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def check_writable(path: str | os.PathLike[str], label: str = "") -> None:
    """Check that a file can be made at `path`, by making one without a name in its folder.

    Permissions alone are not enough: root may write anywhere but in /proc, and nobody on a read-only disk. A file at
    `path` must be an ordinary, writable one: a pipe, a socket or a device is refused. label: the option to name in an
    error, as "--out ". Raises OSError.
    """
    folder = _target(path, label).parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(f"{label}{path}: no file can be written in {folder} ({error.strerror})") from None


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], label: str = "") -> Iterator[BinaryIO]:
    """Open a new file, moved to `path` at the end of the block; if the block raises, nothing has changed.

    The bytes are on the disk before the old file goes: a crash leaves one of the two. A link stays, and its target is
    replaced. The new file has mode, owner and extended attributes of the old one. Raises OSError as `check_writable`
    does, and if the owner cannot be kept.

    >>> with new_file(tmp_path / "a.txt") as file:
    ...     file.write(b"all of it")
    9
    >>> (tmp_path / "a.txt").read_text(), [file.name for file in tmp_path.iterdir()]
    ('all of it', ['a.txt'])
    """
    target = _target(path, label)
    temporary = target.with_name(_temporary_name())  # in its folder: a rename needs one disk
    try:
        with open(temporary, "xb", opener=_private if target.exists() else None) as file:
            if target.exists():
                _take_over(target, file.fileno(), f"{label}{path}")
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str, label: str = "") -> None:
    """Write a text file as `new_file` does, in UTF-8."""
    with new_file(path, label) as file:
        file.write(text.encode())


def is_temporary(file: Path) -> bool:
    """Return whether a file is a half-written one of `new_file`, left by a killed process."""
    return re.fullmatch(r"\.sparsify-[0-9a-f]{16}\.tmp", file.name) is not None


def _temporary_name() -> str:
    return f".sparsify-{secrets.token_hex(8)}.tmp"


def _target(path: str | os.PathLike[str], label: str) -> Path:
    """Return the file at `path`, behind all links. Raises OSError if no other may take its place."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{label}{path}: there is no folder {Path(path).parent}")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return target
    except OSError as error:
        raise type(error)(error.errno, f"{label}{path}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{label}{path}: it is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise OSError(f"{label}{path}: it is a {kind}, which a file would replace; name a file")
    if not os.access(target, os.W_OK):
        raise PermissionError(f"{label}{path}: it is read-only; make it writable, or name another file")
    return target


def _private(path: str, flags: int) -> int:
    """Open a file readable for its owner alone, until it gets the mode of the old one."""
    return os.open(path, flags, 0o600)


def _take_over(old: Path, new: int, name: str) -> None:
    """Give the open file `new` the owner, the mode and the extended attributes (access lists among them) of another."""
    was, now = old.stat(), os.fstat(new)
    if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        try:
            os.fchown(new, was.st_uid, was.st_gid)
        except OSError as error:
            raise type(error)(
                f"{name}: it belongs to user {was.st_uid}, group {was.st_gid}, which a new file cannot "
                f"({error.strerror}); delete it first, or name another file"
            ) from None
    for key in os.listxattr(old) if hasattr(os, "listxattr") else ():
        with contextlib.suppress(OSError):  # some belong to the system
            os.setxattr(new, key, os.getxattr(old, key))
    os.fchmod(new, stat.S_IMODE(was.st_mode))


def check_space(folder: str | os.PathLike[str], n_bytes: int, label: str = "") -> None:
    """Check that the disk of an existing folder has `n_bytes` free, as far as the system tells.

    Raises OSError with both sizes.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # a file system without an answer
        return
    if n_bytes > free:
        raise OSError(
            f"{label}{folder}: {n_bytes / 1e9:.3g} GB are needed there and {free / 1e9:.3g} GB are free; "
            "free some, or choose a folder on another disk"
        )

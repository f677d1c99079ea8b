"""Outputs, checked before the work that fills them: that a file can be written there, and that it has room."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def check_writable(path: str | os.PathLike[str], label: str = "") -> None:
    """Check that a file can be made at `path`, by making one without a name in its folder.

    Permissions alone do not say it: root may write anywhere but in /proc, and nobody on a read-only disk. label: the
    option to name in an error, as "--out ". Raises OSError.
    """
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{label}{path}: there is no folder {Path(path).parent}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{label}{path}: it is a folder; name a file in it")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(f"{label}{path}: no file can be written in {folder} ({error.strerror})") from None


def check_space(folder: str | os.PathLike[str], n_bytes: int, label: str = "") -> None:
    """Check that the disk of an existing folder has `n_bytes` free, as far as the system says.

    Raises OSError with both sizes.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # a file system that does not say
        return
    if n_bytes > free:
        raise OSError(
            f"{label}{folder}: {n_bytes / 1e9:.3g} GB are needed there and {free / 1e9:.3g} GB are free; "
            "free some, or choose a folder on another disk"
        )

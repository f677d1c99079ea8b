"""Checks of the files of a command before its work: outputs can be written, and are none of its inputs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from sparsify.outputs import check_writable

#: Options that name a file or folder to read, and options that name code of the user.
_READ, _CODE = ("weights", "data"), ("model", "data", "inputs", "eval")


def check_output(arguments: argparse.Namespace, option: str, *, reads: tuple[str, ...] = _READ) -> None:
    """Check that a command can write the file of an option, and does not write over one of its inputs.

    reads: the options with files or folders to read, besides hf:FOLDER and the user's own modules. Raises OSError and
    ValueError.
    """
    path, label = getattr(arguments, option), f"--{option} "
    check_writable(path, label)
    if not os.path.exists(path):
        return
    old = os.stat(path)
    for file in _files_read(arguments, reads):
        try:
            new = file.stat()
        except OSError:
            continue
        if (new.st_dev, new.st_ino) == (old.st_dev, old.st_ino):
            raise ValueError(f"{label}{path}: this command reads {file}, which it would replace; name another file")


def _files_read(arguments: argparse.Namespace, reads: tuple[str, ...]) -> Iterator[Path]:
    values = [getattr(arguments, option, None) for option in (*reads, *_CODE)]
    named = [name for value in values for name in (value if isinstance(value, list) else [value])]
    for name in filter(None, named):
        source, _, rest = str(name).partition(":")
        path = Path(rest if source == "hf" else name)
        yield path
        if path.is_dir():
            yield from path.rglob("*")
        module = Path(*source.split("."))
        yield from (module.with_suffix(".py"), module / "__init__.py")

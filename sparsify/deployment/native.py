"""The C library of this installation, for programs without Python (docs/deploy.md)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sparsify.kernels.cpu import library

_PACKAGE = Path(__file__).resolve().parents[1]


class NativePaths(NamedTuple):
    """Places on this machine.

    shared_library: the shared library; it needs an OpenMP runtime (libgomp.so.1), and no Python.
    include: the folder of sparsify.h.
    cmake: the folder for find_package(sparsify), with the target sparsify::sparsify.
    """

    shared_library: Path
    include: Path
    cmake: Path


def native_paths() -> NativePaths:
    """Return the places of the C library, its header and its CMake package.

    Raises RuntimeError if this installation has no native library.
    """
    if not library.available():
        raise RuntimeError(
            f"there is no native library: {library.why_missing()}; `sparsify doctor` knows the way to it"
        )
    return NativePaths(library.path(), _PACKAGE / "csrc", _PACKAGE / "csrc" / "cmake")

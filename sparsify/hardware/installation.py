"""This installation of the package: the command to install it again with native kernels."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

DISTRIBUTION = "sparsify-torch"
_PACKAGE = Path(__file__).resolve().parents[1]


def rebuild_command(package: Path = _PACKAGE) -> str:
    """Return the shell command that builds the native kernels of this installation, once there is a compiler."""
    python = shlex.quote(sys.executable or "python")
    if (package.parent / "setup.py").is_file() and (package / "csrc").is_dir():
        return f"cd {shlex.quote(str(package.parent))} && {python} setup.py build_native"
    source = _source()
    from_index = f"--no-binary {DISTRIBUTION} " if source == DISTRIBUTION else ""
    return f"{python} -m pip install --force-reinstall --no-deps --no-cache-dir {from_index}{shlex.quote(source)}"


def _source() -> str:
    """Return the source that pip installed the package from: an address, or the name on an index.

    A wheel without kernels stays without them: its folder has no source to build.
    """
    try:
        text = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:
        return DISTRIBUTION
    url = str(json.loads(text).get("url", "")) if text else ""
    return url if url and not url.endswith(".whl") else DISTRIBUTION

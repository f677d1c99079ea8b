"""The memory that a computation may still take, of the system or of a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

#: Where the system does not tell.
_UNKNOWN = 4 * 2**30
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the bytes free on a device: of a CPU what the system can give without swapping, within a group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [n for n in (_available(Path("/proc/meminfo")), _left_in_group(_GROUP)) if n is not None]
    return min(limits, default=_UNKNOWN)


def _available(file: Path) -> int | None:
    """Return what Linux calls available, with the memory of files that it can drop."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0]) * 1024 if sizes else None


def _left_in_group(folder: Path) -> int | None:
    """Return what a container's limit leaves (control groups, version 2), or None without one."""
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return None
    return max(int(limit) - int(used), 0) if limit.isdigit() else None

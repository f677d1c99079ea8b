"""This machine, for reports, checkpoints and `sparsify doctor`: its name, and the parts that sparsify can use."""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path

import torch

from sparsify.hardware.installation import rebuild_command
from sparsify.kernels import gpu
from sparsify.kernels.cpu import library as native

_DEFAULT_LLC_BYTES = 32 << 20


def machine_name(device: torch.device | None = None) -> str:
    """Name the parts that a kernel's speed depends on: GPU, or processor, instruction set in use and threads.

    A choice measured under one name says little under another.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kernel = native.kernel() if native.available() else "no native kernels"
    return f"{processor_name()}, {kernel}, {torch.get_num_threads()} threads"


def doctor() -> list[tuple[str, str, str]]:
    """Return (part, state, advice) for every part of this machine that sparsify can use."""
    rows = [
        ("Python", sys.version.split()[0], ""),
        ("torch", torch.__version__, ""),
        ("processor", processor_name(), ""),
        ("threads", str(torch.get_num_threads()), "torch.set_num_threads(n) changes it"),
    ]
    if native.available():
        known = ", ".join(native.known_kernels())
        rows.append(("native kernels", f"{native.kernel()} (built: {known})", "SPARSIFY_KERNEL=NAME forces one"))
        rows.append(("native threads", native.team(), "SPARSIFY_THREADS=openmp, pool or serial forces them"))
    else:
        rows.append(
            (
                "native kernels",
                f"none: {native.why_missing()}",
                f"install a C++ compiler (apt-get install g++), then: {rebuild_command()}; until then exported layers "
                "run on the torch reference, and export(format='auto') keeps them dense",
            )
        )
    if torch.cuda.is_available():
        why = gpu.why_missing(torch.device("cuda", torch.cuda.current_device()))
        what = f"exported layers run there on the torch reference: {why}" if why else "exported layers run there"
        rows.append(("GPU", torch.cuda.get_device_name(), what))
    else:
        rows.append(("GPU", "none", ""))
    return rows


@cache
def last_level_cache_bytes() -> int:
    """Return the size of the last-level cache, 32 MiB if the system does not tell."""
    units = {"K": 10, "M": 20, "G": 30}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) << units[text[-1]])
    return max(sizes, default=_DEFAULT_LLC_BYTES)


def processor_name() -> str:
    """Return the processor's name and family; virtual machines often hide the model."""
    info: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = info.get("model name", platform.machine())
    numbers = [info[key] for key in ("cpu family", "model") if key in info]
    return f"{name} ({platform.machine()} {'/'.join(numbers)})" if numbers else f"{name} ({platform.machine()})"

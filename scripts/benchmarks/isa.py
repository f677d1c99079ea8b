"""The instructions that kernels and peers may use in this process, and the name of their set in files and bars."""

import os
from collections.abc import Collection
from pathlib import Path

from sparsify.hardware.machine import processor_name
from sparsify.kernels.cpu import library as native

#: Flags of /proc/cpuinfo that decide the speed of a linear layer.
FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),  # x86
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),  # ARM
)
#: The name of a feature in scripts/hide -> the flags hidden with it.
HIDDEN = {
    "avx512": ("avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    "amx": ("amx_bf16", "amx_int8"),
    "vnni": ("avx_vnni", "avx512_vnni"),
    "bf16": ("avx512_bf16", "amx_bf16"),
}


def hidden() -> list[str]:
    """Return the names of the features that scripts/hide hides from this process."""
    return os.environ.get("SPARSIFY_HIDDEN", "").split()


def visible() -> list[str]:
    """Return the FLAGS of this processor that are not hidden; empty where Linux does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    gone = {flag for feature in hidden() for flag in HIDDEN[feature]}
    return [flag for flag in FLAGS if flag in flags and flag not in gone]


def kernel() -> str:
    """Return the instruction set of our kernels in use."""
    return native.kernel() if native.available() else "none"


def name(kernel: str, flags: Collection[str]) -> str:
    """Name the instruction set of a run: that of our kernels, and how the processor multiplies int8.

    >>> name("avx512", ["avx512f", "avx512_vnni", "amx_int8"]), name("avx512", ["avx512f", "avx512_vnni"])
    ('avx512-amx', 'avx512-vnni')
    >>> name("avx2", ["avx2", "avx_vnni"]), name("avx2", ["avx2"])
    ('avx2-vnni', 'avx2')
    """
    if kernel.startswith("avx512") and "amx_int8" in flags:
        return f"{kernel}-amx"
    if (kernel.startswith("avx512") and "avx512_vnni" in flags) or (kernel.startswith("avx2") and "avx_vnni" in flags):
        return f"{kernel}-vnni"
    return kernel


def check_peers() -> None:
    """Refuse to compare our kernels with peers that may use AVX-512 when ours are told not to.

    ONNX Runtime and OpenVINO obey no variable. Raises ValueError, naming scripts/hide.
    """
    if "avx512f" in visible() and not kernel().startswith("avx512"):
        raise ValueError(
            f"our kernels are held to {kernel()}, and the peers would use AVX-512; hide it from all of them: "
            "scripts/hide avx512 vnni -- scripts/bench.py ... (without vnni where the processor to stand for has it)"
        )


def slug(processor: str) -> str:
    """Name a processor in the name of a file.

    >>> slug("Intel(R) Xeon(R) Processor (x86_64 6/207)"), slug("AMD EPYC (x86_64 25/17)")
    ('intel-xeon-6-207', 'amd-epyc-25-17')
    """
    for gone in ("(R)", "(TM)", "(r)", "Processor", "CPU", "x86_64"):
        processor = processor.replace(gone, " ")
    words = "".join(c if c.isalnum() or c == "." else " " for c in processor.lower().partition("@")[0])
    tail = "".join(c if c.isalnum() else " " for c in processor.partition("@")[2].partition("(")[2])
    return "-".join([*words.split(), *tail.split()])


def this_machine() -> dict[str, object]:
    """Return the facts that tell runs of several processors and instruction sets apart."""
    flags = visible()
    return {
        "processor": processor_name(),
        "kernel": kernel(),
        "isa": name(kernel(), flags),
        "instructions": flags,
        "hidden": hidden(),
    }

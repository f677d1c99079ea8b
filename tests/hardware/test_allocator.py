"""Freed memory is kept inside a block, and returned at its end."""

import platform
import subprocess
import sys

import pytest

from sparsify.hardware import allocator
from sparsify.hardware.allocator import keeping_freed_memory

# Pages of 16 tensors of 64 MiB, one after the other, that the system had to clear; and the process's memory afterwards.
PROGRAM = """
import contextlib, resource, sys, torch
from sparsify.hardware.allocator import keeping_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def cleared():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()

torch.ones(2**24)
before = resident()
with keeping_freed_memory() if sys.argv[1] == "keeping" else contextlib.nullcontext():
    torch.ones(2**24)
    start = cleared()
    for _ in range(16):
        torch.ones(2**24)
    print(cleared() - start, end=" ")
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_system_clears_memory_once_and_has_it_back() -> None:
    found = {}
    for how in ("usual", "keeping"):
        call = [sys.executable, "-c", PROGRAM, how]
        found[how] = tuple(map(int, subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()))
    assert 4 * found["keeping"][0] < found["usual"][0]  # pages may be of 4 KiB or 2 MiB
    assert found["keeping"][1] < 2**25


def test_blocks_in_blocks_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(allocator, "_set", lambda options: seen.append("keep" if options is KEEPING else "usual"))
    KEEPING = allocator._KEEPING
    with keeping_freed_memory():
        with pytest.raises(RuntimeError, match="inside"), keeping_freed_memory():
            raise RuntimeError("inside")
        assert seen == ["keep"]
    assert seen == ["keep", "usual"]

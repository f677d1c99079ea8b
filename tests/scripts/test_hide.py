"""scripts/hide: a command sees a processor without the named instructions, and its own faults stay its own."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.kernels.cpu import library as native

ROOT = Path(__file__).resolve().parents[2]
HIDE = ROOT / "scripts" / "hide"


def flags() -> set[str]:
    """Return the features of the processor as Linux tells them, empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


needs_faulting = pytest.mark.skipif(
    "cpuid_fault" not in flags() or shutil.which("cc") is None,
    reason="this machine has no cpuid faulting, or no C compiler",
)
#: feature to hide -> the functions of torch.cpu that then say no; any other says what it says without scripts/hide
SEEN = {
    "avx512": {"_is_avx512_supported", "_is_vnni_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"},
    "amx": {"_is_amx_tile_supported"},
    "vnni": {"_is_vnni_supported"},
    "bf16": {"_is_avx512_bf16_supported"},
}
QUESTIONS = sorted(SEEN["avx512"])


def run(code: str, *hidden: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k not in ("SPARSIFY_KERNEL", "ATEN_CPU_CAPABILITY")}
    environment["PYTHONPATH"] = str(ROOT)
    if hidden:
        command = [str(HIDE), *hidden, "--", *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def plain() -> set[str]:
    return seen()


def seen(*hidden: str) -> set[str]:
    """Return the questions that torch answers with yes."""
    result = run(f"import torch\nprint(*[q for q in {QUESTIONS} if getattr(torch.cpu, q)()])", *hidden)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@needs_faulting
@pytest.mark.parametrize("feature", SEEN)
def test_a_hidden_feature_is_not_seen_and_the_others_are(feature, plain):
    assert seen(feature) == plain - SEEN[feature]


@needs_faulting
@pytest.mark.skipif(not native.available() or "avx2" not in flags(), reason="no native kernels, or no AVX2")
def test_the_native_kernels_are_those_of_avx2_without_avx512():
    result = run("from sparsify.kernels.cpu import library; print(library.kernel())", "avx512", "vnni")
    assert result.stdout.split() == ["avx2"], result.stderr


@needs_faulting
def test_children_see_the_same_and_a_crash_is_still_a_crash():
    child = "import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', %r], text=True))"
    question = "import os, torch; print(torch.cpu._is_avx512_supported(), os.environ['SPARSIFY_HIDDEN'])"
    result = run(child % question, "avx512", "bf16")
    assert result.stdout.split() == ["False", "avx512", "bf16"], result.stderr
    crash = run("import ctypes; ctypes.string_at(0)", "amx")
    assert crash.returncode in (-signal.SIGSEGV, 128 + signal.SIGSEGV)


@pytest.mark.parametrize("arguments", [["sse9", "--", "true"], ["amx"], ["amx", "--"], ["--", "true"], []])
def test_a_wrong_call_says_what_to_write(arguments):
    result = subprocess.run([HIDE, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "scripts/hide FEATURE ... -- COMMAND" in result.stderr

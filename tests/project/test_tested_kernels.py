"""The last lines of a run name the instruction sets tested, and a run that tested none fails."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tested_kernels import TestedKernels, needs_native

from sparsify.kernels.cpu import library as native

KNOWN = ["avx512", "avx2", "portable"]
LACKS = "avx512: this processor lacks the instructions of the kernel"


def test_what_was_tested_and_what_not_is_said():
    run = TestedKernels(KNOWN, in_use="avx2", ran=Counter(avx2=7, portable=8), skipped={"avx512": LACKS})
    assert run.lines() == [
        "native kernels tested: avx2 (7 tests), portable (8 tests); all other tests ran on avx2",
        f"native kernels not tested: {LACKS}",
    ]
    assert run.fault(whole_suite=True) == run.fault(whole_suite=False) == ""


def test_a_whole_suite_that_tested_no_kernel_fails():
    run = TestedKernels(KNOWN, in_use="avx2")
    assert "no native kernel" in run.fault(whole_suite=True)
    assert run.fault(whole_suite=False) == ""  # pytest -k of other tests
    assert run.lines() == ["native kernels tested: none, no test of one was selected; all tests ran on avx2"]


def test_kernel_tests_that_were_all_skipped_fail():
    run = TestedKernels(KNOWN, in_use="portable", skipped=dict.fromkeys(KNOWN, LACKS))
    assert "no native kernel" in run.fault(whole_suite=False)


def test_only_a_machine_without_a_compiler_may_test_none():
    without = TestedKernels([], why_missing="no C++ compiler: 'g++' is not on PATH (install g++, or set CXX)")
    assert without.fault(whole_suite=True) == ""
    assert without.lines() == [f"NO NATIVE KERNEL WAS TESTED: {without.why_missing}"]
    broken = TestedKernels([], why_missing="g++ -c linear.cpp failed:\nerror: expected ';'")
    assert "not there" in broken.fault(whole_suite=False)


def test_code_that_instruction_sets_share_is_known(kernel):
    """Leaving its tests out on all but one of them depends on that; one that is not here counts as its own."""
    for form in native.FORMS:
        assert native.kernel_origin(kernel, form, quantized=False) in ("avx512", "avx2", "portable")
    for name, form, quantized, origin in (
        ("avx512vnni", "panel", False, "avx512"),
        ("avx512amx", "quads", True, "avx512vnni"),
        ("avx512amx", "quadmask", True, "avx512amx"),
        ("avxvnni", "quads", True, "avxvnni"),
    ):
        if name == kernel:
            assert native.kernel_origin(name, form, quantized=quantized) == origin


@needs_native
def test_an_unknown_instruction_set_shares_nothing():
    with pytest.raises(ValueError, match=r"sse9: unknown kernel; known: .*portable"):
        native.kernel_origin("sse9", "panel", quantized=False)


@needs_native
def test_a_run_without_its_library_skips_kernel_tests_and_fails():
    """The hooks of pytest use all that: the skips give the reason, the last line too, and the exit status is 1."""
    folder = Path(__file__).parents[1]
    environment = {**os.environ, "SPARSIFY_NATIVE_LIBRARY": "/nowhere/_native.so"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "kernels/cpu/test_clear.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    *_, untested, failed, _counts = done.stdout.splitlines()
    assert "skipped" in _counts
    assert "passed" not in _counts
    assert untested == "NO NATIVE KERNEL WAS TESTED: /nowhere/_native.so was not built"
    assert failed.startswith("FAILED: the native library is not there")

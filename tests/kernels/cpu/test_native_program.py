"""A C++ program without torch compares each kernel with the portable ones: here, and for aarch64 under an emulator."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.kernels.cpu import library as native

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("native")
CROSS, EMULATOR, CROSS_FILES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
#: Processors of the emulator: everything it knows, and one without dot products.
EMULATED = {"max": "neondot neon portable", "cortex-a72": "neon portable"}
#: Compiled in half the time of -O3; the second flag fuses products and sums, as every level from -O2 on does.
#: CXXFLAGS come after both, and scripts/check has -O3 there.
CROSS_FLAGS = "-O1 -fexpensive-optimizations"
FLOAT_FORMS = ("panel", "bitmask", "gather", "sell")


def compiled(compiler: list[str], library: Path, folder: Path) -> Path:
    """Build the program against a library."""
    sources = [str(PROGRAM / name) for name in ("kernels.cpp", "images.cpp", "others.cpp")]
    program = folder / "kernels"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", f"-I{ROOT / 'sparsify/csrc'}", "-o", str(program)]
    done = subprocess.run([*compiler, *options, *sources, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return program


def counts(output: str) -> dict[str, int]:
    """Read how many cases the program compared, by kind."""
    return {kind: int(n) for kind, n in re.findall(r"^(.*): (\d+)$", output, re.MULTILINE)}


def assert_all_were_compared(output: str, runs_own_code: Callable[[str, bool], bool]) -> None:
    """Each form took part, with each dtype, for which `runs_own_code(form, is int8)`, and no other."""
    kinds = counts(output)
    of_forms = {(form, dtype) for form in FLOAT_FORMS for dtype in ("f32", "bf16", "f16", "int8")}
    of_forms |= {(form, "int8") for form in native.QUANTIZES_INPUTS} | {("pairmask", "bf16")}
    own = {(form, dtype) for form, dtype in of_forms if runs_own_code(form, dtype == "int8")}
    assert own
    wanted = {f"{form} {dtype}" for form, dtype in own}
    wanted |= {"images", "depthwise", "gradients", "masks", "two layers in one call"}
    assert {kind.split(",")[0] for kind in kinds} == wanted
    assert all(kinds[f"{form} int8, bit for bit"] > 60 for form, _ in own if form in native.QUANTIZES_INPUTS)


@pytest.fixture(scope="module")
def program_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program for this machine, or a skip."""
    if not native.available():
        pytest.skip(f"no native kernels: {native.why_missing()}")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(compiler[0]):
        pytest.skip(f"no C++ compiler: {compiler[0]} is not on PATH")
    return compiled(compiler, native._LIBRARY, tmp_path_factory.mktemp("program"))


def test_every_kernel_of_this_machine_agrees_with_the_portable_ones(kernel: str, program_here: Path) -> None:
    done = subprocess.run([program_here, kernel], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_all_were_compared(
        done.stdout, lambda form, is_int8: native.kernel_origin(kernel, form, quantized=is_int8) == kernel
    )


@pytest.fixture(scope="module")
def program_for_aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library and the program for aarch64, or a skip."""
    for tool, package in ((CROSS, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if not shutil.which(tool):
            pytest.skip(f"no {tool}: apt-get install {package}")
    folder = tmp_path_factory.mktemp("aarch64")
    compiler = [*(["ccache"] if shutil.which("ccache") else []), CROSS]
    library = folder / "_native.so"
    build = [sys.executable, "setup.py", "-q", "build_native", f"--flags={CROSS_FLAGS}", "--output", str(library)]
    done = subprocess.run(
        build, cwd=ROOT, env={**os.environ, "CXX": shlex.join(compiler)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr
    return compiled([CROSS], library, folder)


def run_for_aarch64(
    program: Path, processor: str, *arguments: str, threads: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the program by the emulator."""
    emulator = [EMULATOR, "-cpu", processor, "-L", CROSS_FILES]
    return subprocess.run(
        [*emulator, str(program), *arguments],
        env={**os.environ, "SPARSIFY_THREADS": threads, "SPARSIFY_KERNEL": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("processor", "tested"), [("max", "neondot"), ("cortex-a72", "neon")])
def test_every_kernel_of_aarch64_agrees_with_the_portable_ones(
    program_for_aarch64: Path, processor: str, tested: str
) -> None:
    """Sums of integers, and those of floats that are added in the same order, are the same bits.

    With dot products only the forms that use them have code of their own.
    """
    done = run_for_aarch64(program_for_aarch64, processor, tested, "bits", threads="pool")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tested}, threads pool" in done.stdout
    assert_all_were_compared(done.stdout, lambda form, _: tested == "neon" or form in native.QUANTIZES_INPUTS)
    kinds = counts(done.stdout)
    floats = ("panel", "bitmask") if tested == "neon" else ()
    assert all(kinds[f"{form} f32, bit for bit"] > 60 for form in floats)
    assert {"images, bit for bit", "gradients, bit for bit"} <= set(kinds)


@pytest.mark.parametrize("processor", EMULATED)
def test_a_processor_of_aarch64_runs_what_it_has(program_for_aarch64: Path, processor: str) -> None:
    here = EMULATED[processor].split()
    assert run_for_aarch64(program_for_aarch64, processor).stdout.split() == [here[0], "openmp"]
    for name in ("neondot", "avx2"):
        refused = run_for_aarch64(program_for_aarch64, processor, name, "only").returncode == 3
        assert refused == (name not in here)

"""The library is compiled for macOS and Windows here, by zig; scripts/cross_builds links the whole of it."""

import importlib.util
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
#: The script's targets, each with one of its instruction sets.
TARGETS = {"aarch64-macos": "neondot", "x86_64-macos": "avx2", "x86_64-windows-gnu": "avx2"}
#: What tells one system or machine from another.
DIFFERENT = re.compile(r"_WIN32|__APPLE__|__linux__|__x86_64__|__aarch64__|\"runtime/system.h\"|_OPENMP")


def compiled_here(machine: object, isa: str) -> list[Path]:
    """Return the sources that differ between systems, and those of one instruction set and of none."""
    isas = {SETUP["SOURCES"] / "isa" / f"{name}.cpp" for name in (isa, "portable")}
    sources = SETUP["sources"](machine)
    assert isas <= set(sources)
    return [s for s in sources if s in isas or ("isa" not in s.parts and DIFFERENT.search(s.read_text()))]


@pytest.mark.parametrize("target", TARGETS)
def test_what_differs_between_systems_compiles(target: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("no zig: pip install ziglang")
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target]
    machine = SETUP["Target"].of(compiler)

    def problems(source: Path) -> str:
        command = SETUP["compile_command"](compiler, machine, ["-O0"], source)
        done = subprocess.run([*command, "-o", str(tmp_path / f"{source.stem}.o")], capture_output=True, text=True)
        return done.stdout + done.stderr if done.returncode or "warning:" in done.stderr else ""

    sources = compiled_here(machine, TARGETS[target])
    assert {"system.cpp", "team.cpp", "instructions.cpp", "dispatch.cpp"} <= {source.name for source in sources}
    with ThreadPoolExecutor(2) as pool:
        found = [text for text in pool.map(problems, sources) if text]
    assert not found, found[0]
    assert len(list(tmp_path.glob("*.o"))) == len(sources)


def test_the_script_builds_for_the_systems_tested_here() -> None:
    script = (ROOT / "scripts/cross_builds").read_text()
    assert re.search(r"targets=\((.*)\)\n\"", script)[1].split() == list(TARGETS)


def test_a_library_for_another_system_has_the_flags_of_that_system() -> None:
    of = SETUP["Target"].named
    assert "-fopenmp" in of("x86_64-linux").flags()
    assert not {"-fopenmp"} & {*of("aarch64-macos").flags(), *of("x86_64-windows-gnu").flags()}
    dots = SETUP["SOURCES"] / "isa" / "neondot.cpp"
    assert "-march=armv8.2-a+dotprod" in SETUP["compile_command"](["c++"], of("aarch64-linux"), [], dots)
    assert not any("march" in word for word in SETUP["compile_command"](["c++"], of("aarch64-macos"), [], dots))

"""Build of the native CPU kernels; everything else about the package is declared in setup.cfg and pyproject.toml.

The library is plain C++ behind a C interface, loaded with ctypes: it needs a C++ compiler and nothing else, neither
torch nor Python headers. Without a compiler the installation still succeeds, without it; the reason is written next to
where it would be, and `sparsify.kernels.cpu.library.why_missing()` reads it. A wheel without the library is for any
platform and has the build tag `0nokernels`, so that its name differs from that of a wheel with it.

    pip install .                  builds it into the wheel
    pip install -e .               builds it in place, as sparsify/_native.so
    python setup.py build_native   builds it in place again, in seconds, after a change of the C++ sources

CXX names the compiler, perhaps one for another machine: the library, and the tag of a wheel, are for its target.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1; pip asks for the package wheel there
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        bdist_wheel = Command

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "sparsify" / "csrc"
LIBRARY = "_native.so"
REASON = "_native.missing.txt"
#: The recipes of ours, and their place in an installed package.
RECIPES, INSTALLED_RECIPES = ROOT / "recipes", Path("recipes", "given")
#: The address of the project, for links on an index page; whoever hosts the project sets it.
URL_VARIABLE = "SPARSIFY_PROJECT_URL"
NO_KERNELS = "0nokernels"

COMMON_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
# g++ 12 calls the undefined registers of its own AVX-512 headers "maybe uninitialized" (GCC bug 105593).
AVX512_FLAGS = (
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vbmi2 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt "
    "-Wno-unknown-warning-option -Wno-maybe-uninitialized -Wno-uninitialized"
)
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"]
#: The sources for some machines alone, and their flags, by machine.
ISA_FLAGS = {
    "x86_64": {
        "isa/avx512amx.cpp": [*AVX512_FLAGS.split(), "-mavx512vnni", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
        "isa/avx512.cpp": AVX512_FLAGS.split(),
        "isa/avx512vnni.cpp": [*AVX512_FLAGS.split(), "-mavx512vnni"],
        "isa/avx2.cpp": AVX2_FLAGS,
        "isa/avxvnni.cpp": [*AVX2_FLAGS, "-mavxvnni"],
    },
    "aarch64": {"isa/neon.cpp": [], "isa/neondot.cpp": ["-march=armv8.2-a+dotprod"]},
}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Target:
    """What a compiler compiles for: a machine (x86_64, aarch64) and a system (linux, macos, windows)."""

    machine: str
    system: str

    @classmethod
    def of(cls, compiler: Sequence[str]) -> "Target":
        """Ask the compiler; one that does not say compiles for this machine.

        >>> Target.of(["clang++", "-target", "aarch64-macos"])
        Target(machine='aarch64', system='macos')
        """
        words = list(compiler)
        if "-target" in words[:-1]:
            return cls.named(words[words.index("-target") + 1])
        done = subprocess.run([*words, "-dumpmachine"], capture_output=True, text=True)
        return cls.named(done.stdout.strip()) if done.returncode == 0 and done.stdout else cls.here()

    @classmethod
    def here(cls) -> "Target":
        """Return this machine."""
        return cls.named(f"{platform.machine()}-{platform.system()}")

    @classmethod
    def named(cls, triple: str) -> "Target":
        """Read a name as compilers have it: machine first.

        >>> Target.named("x86_64-w64-mingw32"), Target.named("arm64-apple-darwin24")
        (Target(machine='x86_64', system='windows'), Target(machine='aarch64', system='macos'))
        """
        machine, _, rest = triple.lower().partition("-")
        systems = {"darwin": "macos", "macos": "macos", "mingw": "windows", "windows": "windows"}
        system = next((system for name, system in systems.items() if name in rest), "linux")
        return cls(MACHINES.get(machine, machine), system)

    def flags(self) -> list[str]:
        """Return the flags for every file: OpenMP is used where torch brings the same runtime."""
        if self.system == "linux":
            return ["-fPIC", "-fopenmp"]
        return ["-fPIC"] if self.system == "macos" else []

    def link_flags(self) -> list[str]:
        """Return the flags for the library. Its threads never end: it stays in a process that unloads it."""
        own = {"linux": ["-Wl,-z,nodelete"], "macos": [f"-Wl,-install_name,@rpath/{LIBRARY}"]}
        return ["-shared", *own.get(self.system, [])]

    def wheel_platform(self) -> str:
        """Return the platform in the tag of a wheel."""
        if self.system == "macos":
            return "macosx_11_0_arm64" if self.machine == "aarch64" else "macosx_10_15_x86_64"
        if self.system == "windows":
            return "win_arm64" if self.machine == "aarch64" else "win_amd64"
        return f"{self.system}_{self.machine}"


def the_compiler() -> list[str]:
    """Return the command that CXX names, g++ without one."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++" if shutil.which("g++") else "c++"]


def sources(machine: Target) -> list[Path]:
    """Return the files to compile for a machine: all but those of other machines' instruction sets."""
    others = {name for other, files in ISA_FLAGS.items() if other != machine.machine for name in files}
    return [file for file in sorted(SOURCES.rglob("*.cpp")) if file.relative_to(SOURCES).as_posix() not in others]


def compile_command(compiler: Sequence[str], machine: Target, flags: Sequence[str], source: Path) -> list[str]:
    """Return the command that compiles one source; the object file's name is left to the caller."""
    isa = ISA_FLAGS.get(machine.machine, {}).get(source.relative_to(SOURCES).as_posix(), [])
    # Every Mac with an ARM processor has dot products: they are the compiler's default, which a flag could only lower.
    isa = [] if (machine.machine, machine.system) == ("aarch64", "macos") else isa
    return [*compiler, *COMMON_FLAGS, *machine.flags(), *flags, f"-I{SOURCES}", *isa, "-c", str(source)]


def build_native(target: Path, extra_flags: Sequence[str] = ()) -> None:
    """Compile SOURCES into the shared library `target`. Raises RuntimeError that says which command failed."""
    compiler = the_compiler()
    if not shutil.which(compiler[0]):
        raise RuntimeError(f"no C++ compiler: {compiler[0]!r} is not on PATH (install g++, or set CXX)")
    machine = Target.of(compiler)
    flags = [*extra_flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]

    def run(command: list[str]) -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.stdout:
            print(done.stdout, file=sys.stderr)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout[-4000:]}")

    with tempfile.TemporaryDirectory() as build:

        def compile_one(source: Path) -> str:
            made = f"{build}/{source.relative_to(SOURCES).as_posix().replace('/', '_')}.o"
            run([*compile_command(compiler, machine, flags, source), "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources(machine)))
        # Linked under its own name, which a Windows library says of itself; then put beside the target and renamed: a
        # process that has the old library loaded keeps the old file.
        made, fresh = Path(build, target.name), target.with_name(target.name + f".{os.getpid()}")
        link = [*COMMON_FLAGS, *machine.flags(), *flags, *machine.link_flags()]
        run([*compiler, *link, *objects, "-o", str(made)])
        shutil.copy(made, fresh)
        os.replace(fresh, target)


def build_or_explain(package: Path) -> None:
    """Build into the package directory; on failure leave a file with the reason there instead."""
    library, reason = package / LIBRARY, package / REASON
    for old in (library, reason):
        old.unlink(missing_ok=True)
    try:
        build_native(library)
    except (RuntimeError, OSError) as error:
        reason.write_text(f"{error}\n")
        print(f"warning: sparsify is installed without its native kernels: {error}", file=sys.stderr)


class BuildNative(Command):
    """Build the library in place; a failure is an error here. --flags adds compiler flags, --output another path."""

    description = "build sparsify/_native.so in place"
    user_options = [("flags=", None, "further compiler flags"), ("output=", None, "library to write")]  # noqa: RUF012

    def initialize_options(self):
        """Set what the command line may override."""
        self.flags, self.output = "", ""

    def finalize_options(self):
        """Have nothing to derive."""

    def run(self):
        """Build."""
        build_native(Path(self.output or ROOT / "sparsify" / LIBRARY), shlex.split(self.flags))


class BuildPy(build_py):
    """Copy the package and its recipes, then build the library; an editable installation has all of it in place."""

    def run(self):
        """Build both."""
        super().run()
        if self.editable_mode:
            build_or_explain(ROOT / "sparsify")
            return
        package = Path(self.build_lib) / "sparsify"
        shutil.rmtree(package / INSTALLED_RECIPES, ignore_errors=True)
        shutil.copytree(RECIPES, package / INSTALLED_RECIPES)
        build_or_explain(package)

    def get_outputs(self, include_bytecode=True):
        """List what run wrote, for the record of the installation."""
        package = Path(self.build_lib) / "sparsify"
        recipes = (package / INSTALLED_RECIPES / file.name for file in RECIPES.glob("*.yaml"))
        made = [] if self.editable_mode else [package / LIBRARY, package / REASON, *recipes]
        return super().get_outputs(include_bytecode) + [str(f) for f in made if f.exists()]


class BdistWheel(bdist_wheel):
    """A wheel for the compiler's platform and, as the library uses no CPython interface, any Python 3."""

    def get_tag(self):
        """Name the Pythons and platforms the wheel is for: without the library any platform, under another name."""
        built = self.distribution.get_command_obj("build_py")
        if getattr(built, "build_lib", None) and (Path(built.build_lib) / "sparsify" / REASON).exists():
            self.build_number, self.root_is_pure = NO_KERNELS, True
            return "py3", "none", "any"
        named, target = super().get_tag()[2], Target.of(the_compiler())
        # The name of this platform may say more than the compiler does: which version of macOS, for example.
        return "py3", "none", named if target == Target.here() else target.wheel_platform()


class PlatformDistribution(Distribution):
    """Tells setuptools that the package is not pure Python."""

    def has_ext_modules(self):
        """Say so."""
        return True


def description(readme: str, url: str) -> str:
    """Return the README for the page of an index: links lead to `url`, and without one are plain words.

    >>> description("[guide](docs/guide.md), [torch](https://pytorch.org), ![A picture](speed.svg)", "")
    'guide, [torch](https://pytorch.org), '
    """

    def link(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        if not url:
            return "" if picture else text
        return f"{picture}[{text}]({url.rstrip('/')}/{'raw' if picture else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, readme)


if __name__ == "__main__":
    url = os.environ.get(URL_VARIABLE, "")
    setup(
        long_description=description((ROOT / "README.md").read_text(encoding="utf-8"), url),
        project_urls={"Source": url, "Issues": f"{url.rstrip('/')}/issues"} if url else {},
        distclass=PlatformDistribution,
        cmdclass={"build_native": BuildNative, "build_py": BuildPy, "bdist_wheel": BdistWheel},
    )

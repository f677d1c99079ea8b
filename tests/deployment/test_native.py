"""The C library as programs find it: paths, CMake package, example; hostile files under valgrind."""

import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_files import File, source
from test_container_fuzz import random_lies
from test_lying_files import LIES, TABLES
from torch import nn

import sparsify
from sparsify.kernels.cpu import library

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "checkpoint"

pytestmark = pytest.mark.skipif(not library.available(), reason=f"no native kernels: {library.why_missing()}")


def test_the_paths_lead_to_the_library_its_header_and_its_cmake_package() -> None:
    paths = sparsify.native_paths()
    assert paths.shared_library == library.path()
    header = (paths.include / "sparsify.h").read_text()
    assert f'#define SPARSIFY_VERSION "{sparsify.__version__}"' in header
    version = library.function("sparsify_version", (library.ctypes.c_char_p, []))
    assert version() == sparsify.__version__.encode()
    assert (paths.cmake / "sparsify-config.cmake").is_file()


def test_every_status_has_words() -> None:
    words = library.function("sparsify_status_text", (library.ctypes.c_char_p, [library.ctypes.c_int]))
    header = (sparsify.native_paths().include / "sparsify.h").read_text()
    numbers = [int(n) for n in re.findall(r"SPARSIFY_[A-Z_]+ = (-\d+),", header)]
    assert len(numbers) >= 8
    texts = {words(number) for number in numbers}
    assert len(texts) == len(numbers)
    assert b"unknown status" not in texts


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the example: by CMake where it is, else with the compiler alone."""
    if not shutil.which("g++"):
        pytest.skip("there is no g++")
    build, paths = tmp_path_factory.mktemp("build"), sparsify.native_paths()
    if shutil.which("cmake"):
        configure = ["cmake", "-S", EXAMPLE, "-B", build, f"-Dsparsify_DIR={paths.cmake}", "-DCMAKE_BUILD_TYPE=Debug"]
        commands = [configure, ["cmake", "--build", build]]
    else:
        link = [paths.shared_library, f"-Wl,-rpath,{paths.shared_library.parent}"]
        include = ["-std=c++17", "-g", f"-I{paths.include}"]
        commands = [["g++", *include, EXAMPLE / "multiply.cpp", *link, "-o", build / "multiply"]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "multiply"


def hostile(folder: Path, good: bytes, n_lies: int) -> list[Path]:
    """Return files that Python refuses or finds to hold another model, with every hash right."""
    rng, raws = random.Random(5), []
    for lie, _ in LIES.values():
        file = File(good)
        lie(file)
        raws.append(file.bytes())
    raws += [File(good).bytes(entries=change) for change in TABLES.values()]
    for _ in range(n_lies):
        file = File(good)
        random_lies(file, rng)
        raws.append(file.bytes())
    raws += [good[: len(good) * part // 10] for part in range(10)]
    paths = [folder / f"{number}.safetensors" for number in range(len(raws))]
    for path, raw in zip(paths, raws, strict=True):
        path.write_bytes(raw)
    return paths


def outputs(text: str) -> dict[str, torch.Tensor]:
    found = re.findall(r"^(\S+) \(\d+ x \d+, .*\) \w+: (.*)$", text, re.MULTILINE)
    return {name: torch.tensor([float(number) for number in numbers.split()]) for name, numbers in found}


def given_input(inner: int) -> torch.Tensor:
    """Return the input of the example, bit for bit: where inputs are quantised, a last bit may decide a byte."""
    return ((torch.arange(2 * inner) * 37 % 101).float() / 50 - 1).view(2, inner)


@pytest.mark.parametrize("form", ["auto", *library.INT8_FORMS])
@pytest.mark.parametrize("quantize", [None, "int8", "int8-weights"])
def test_the_example_multiplies_as_python_does(program: Path, tmp_path: Path, form: str, quantize: str | None) -> None:
    if form in library.QUANTIZES_INPUTS and quantize != "int8":
        pytest.skip("of int8 values and inputs alone")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 8, bias=False), nn.Linear(8, 3))
    masked = sparsify.prune(sparsify.convert(model), 0.6)
    options: dict[str, Any] = {"tokens": 2} if form == "auto" else {}
    if quantize is not None:
        options |= {"quantize": quantize, "max_error": 1.0}
    fast = sparsify.export(masked, format=form, **options)
    sparsify.save(fast, tmp_path / "model.safetensors")
    done = subprocess.run([program, tmp_path / "model.safetensors"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = outputs(done.stdout)
    loaded = sparsify.load(tmp_path / "model.safetensors", nn.Sequential(*map(_like, model)))
    assert set(found) == {row.name for row in sparsify.inspect(tmp_path / "model.safetensors")}
    for name, numbers in found.items():
        layer = loaded[int(name)]
        torch.testing.assert_close(
            numbers, layer(given_input(layer.in_features)).reshape(-1)[:16], rtol=1e-5, atol=1e-5
        )


def _like(module: nn.Module) -> nn.Module:
    if not hasattr(module, "in_features"):
        return nn.ReLU()
    return nn.Linear(module.in_features, module.out_features, module.bias is not None)


def test_hostile_files_end_in_a_sentence(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    sparsify.save(source(), path)
    done = subprocess.run([program, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert set(outputs(done.stdout)) == {"csr", "bits", "masked", "full", "rounded"}
    for file in hostile(tmp_path, path.read_bytes(), 100):
        done = subprocess.run([program, file], capture_output=True, text=True)
        assert done.returncode in (0, 1), f"{file}: {done.returncode}"
        assert done.stdout or done.returncode == 0  # a file without layers
        assert not done.stderr


def test_valgrind_finds_nothing(program: Path, tmp_path: Path) -> None:
    if not shutil.which("valgrind"):
        pytest.skip("there is no valgrind")
    path = tmp_path / "good.safetensors"
    sparsify.save(source(), path)
    command = ["valgrind", "-q", "--error-exitcode=99", "--leak-check=full", "--errors-for-leak-kinds=definite"]
    files = [path, *hostile(tmp_path, path.read_bytes(), 30)]
    done = subprocess.run([*command, program, *files], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[:3000]
    assert "==" not in done.stderr
    assert outputs(done.stdout).keys() >= {"csr", "bits", "masked", "full", "rounded"}

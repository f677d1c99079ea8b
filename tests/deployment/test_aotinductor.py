"""Packages of AOTInductor with sparse layers, run without `import sparsify`: the operators of the C library."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify.kernels.cpu import library
from sparsify.kernels.torch_ops import FORM_IDS

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "aotinductor"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not library.available(), reason=f"no native kernels: {library.why_missing()}"),
]

#: Registers the operators, and compares each with the answers of those in Python.
_CALLS = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
assert library.sparsify_register_torch() == 0
assert library.sparsify_register_torch() != 0, "they were registered twice"
for name, schema in torch.load(sys.argv[2] + "/schemas.pt").items():
    assert str(getattr(torch.ops.sparsify, name).default._schema) == schema, name
for name, arguments, expected in torch.load(sys.argv[2] + "/calls.pt"):
    if isinstance(expected, str):
        try:
            getattr(torch.ops.sparsify, name)(*arguments)
        except RuntimeError as error:
            assert expected in str(error), (expected, str(error))
            continue
        raise AssertionError(f"{name} returned, expected: {expected}")
    found = getattr(torch.ops.sparsify, name)(*arguments)
    assert found.shape == expected.shape and found.stride() == expected.stride(), (name, found.stride())
    torch.testing.assert_close(found, expected)
assert "sparsify" not in sys.modules
"""

_PACKAGE = """
import ctypes, sys, torch
assert ctypes.CDLL(sys.argv[1]).sparsify_register_torch() == 0
x, expected = torch.load(sys.argv[2] + "/calls.pt")
model = torch._inductor.aoti_load_package(sys.argv[2] + "/model.pt2")
torch.testing.assert_close(model(x), expected)
assert "sparsify" not in sys.modules
"""


def run_without_sparsify(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", code, str(sparsify.native_paths().shared_library), str(folder)]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=folder)


def calls(dtype: torch.dtype) -> list[tuple[str, tuple[object, ...], torch.Tensor]]:
    """Return calls of operators, each with its answer."""
    torch.manual_seed(0)
    made = []

    def call(name: str, *arguments: object) -> None:
        made.append((name, arguments, getattr(torch.ops.sparsify, name)(*arguments)))

    for form, bias in (("panel", True), ("bitmask", False), ("gather", True), ("sell", False)):
        layer = packed(nn.Linear(70, 33, bias=bias, dtype=dtype), form)
        number, own_bias = FORM_IDS[form], layer.bias if bias else None
        for x in (
            torch.randn(5, 70, dtype=dtype),
            torch.randn(2, 3, 140, dtype=dtype)[..., ::2],
            torch.ones(70, dtype=dtype),
        ):
            call("linear_packed", x, layer.index, layer.values, number, own_bias, 33, 70, 1)
        call("linear_packed", x, layer.index, layer.values, number, own_bias, 33, 70, 0, 3, 17)
    for form in ("panel", "quadsteps"):
        layer = packed(nn.Linear(70, 33, dtype=dtype), form, quantize="int8")
        number = library.FORM_NUMBERS[form]
        call("linear_int8", torch.randn(5, 70, dtype=dtype), *layer.tensors, number, layer.bias, 33, 70, 2)
    convolution = packed(nn.Conv2d(8, 24, 3, padding=1, dtype=dtype), "panel")
    x = torch.randn(2, 8, 11, 13, dtype=dtype)
    for images in (x, x.to(memory_format=torch.channels_last)):
        sizes = (24, 72, 3, 3, 1, 1, 1, 1, 1, 1, 1)
        call("convolution_packed", images, *convolution.tensors, torch.rand(24), convolution.bias, *sizes)
    pointwise = packed(nn.Conv2d(8, 24, 1, dtype=dtype), "panel")
    call("pointwise_packed", x, *pointwise.tensors, None, 24, 8, 1)
    return made


def packed(module: nn.Module, form: str, quantize: str | None = None) -> sparsify.CSRLinear:
    model = sparsify.prune(sparsify.convert(nn.Sequential(module).eval(), types=[type(module)]), 0.7)
    layer = sparsify.export(model, format=form, quantize=quantize, max_error=1.0)[0]
    return layer.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operators_in_c_answer_as_those_in_python(dtype: torch.dtype, tmp_path: Path) -> None:
    names = ("linear_packed", "linear_int8", "pointwise_packed", "convolution_packed")
    torch.save(
        {name: str(getattr(torch.ops.sparsify, name).default._schema) for name in names}, tmp_path / "schemas.pt"
    )
    made = calls(dtype)
    assert {name for name, _, _ in made} == set(names)
    torch.save(made, tmp_path / "calls.pt")
    done = run_without_sparsify(_CALLS, tmp_path)
    assert done.returncode == 0, done.stderr


def test_wrong_calls_are_errors(tmp_path: Path) -> None:
    layer = packed(nn.Linear(70, 33), "panel")
    x, index, values = torch.randn(5, 70), layer.index, layer.values
    torch.save({}, tmp_path / "schemas.pt")
    wrong = (
        ((x[:, :69], index, values, 0, None, 33, 70, 0), "takes inputs of 70 features"),
        ((x, index[:-8], values, 0, None, 33, 70, 0), "cannot be read"),
        ((x, index.flip(0), values, 0, None, 33, 70, 0), "cannot be read"),
        ((x, index, values, 0, None, 33, 71, 0), "cannot be read"),
        ((x, index, values, 1, None, 33, 70, 0), "cannot be read"),
        ((x, index, values, 5, None, 33, 70, 0), "not one for the CPU"),
        ((x, index, values, 0, torch.ones(32), 33, 70, 0), "an entry for each"),
        ((x, index, values, 0, None, 33, 70, 0, 5, 34), "rows 0 to 33"),
        ((x, index, values, 0, None, 33, 70, 9), "out of range"),
        ((x.double(), index, values, 0, None, 33, 70, 0), "of one type"),
    )
    torch.save([("linear_packed", arguments, message) for arguments, message in wrong], tmp_path / "calls.pt")
    done = run_without_sparsify(_CALLS, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_beside_the_package_itself_they_are_refused() -> None:
    register = library.function("sparsify_register_torch", (library.ctypes.c_int, []))
    assert register() != 0


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package, its input and the answer of the model, or a skip."""
    if not shutil.which("g++"):
        pytest.skip("AOTInductor needs g++, and there is none")
    folder = tmp_path_factory.mktemp("package")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).eval()
    fast = sparsify.export(sparsify.prune(sparsify.convert(model), 0.7), format="panel").requires_grad_(False)
    x = torch.randn(5, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        program = torch.export.export(fast, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        torch.save((x, fast(x)), folder / "calls.pt")
    return folder


def test_a_package_runs_without_sparsify(package: Path) -> None:
    done = run_without_sparsify(_PACKAGE, package)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the example: by CMake where it is, else with the compiler alone; a skip without torch's headers."""
    of_torch = Path(torch.__file__).parent
    if not (of_torch / "include/torch/csrc/inductor/aoti_package/model_package_loader.h").exists():
        pytest.skip("this torch came without its C++ headers")
    build, paths = tmp_path_factory.mktemp("build"), sparsify.native_paths()
    if shutil.which("cmake"):
        places = [f"-Dsparsify_DIR={paths.cmake}", f"-DTORCH={of_torch}"]
        commands = [["cmake", "-S", EXAMPLE, "-B", build, *places], ["cmake", "--build", build]]
    else:
        folders = [f"-I{paths.include}", f"-isystem{of_torch}/include"]
        folders += [f"-isystem{of_torch}/include/torch/csrc/api/include", f"-L{of_torch}/lib"]
        link = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", str(paths.shared_library)]
        link += [f"-Wl,-rpath,{of_torch}/lib:{paths.shared_library.parent}", "-o", str(build / "run_package")]
        commands = [["g++", "-std=c++20", *folders, str(EXAMPLE / "run_package.cpp"), *link]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "run_package"


def test_the_example_runs_a_package_in_cpp(package: Path, program: Path, tmp_path: Path) -> None:
    x, expected = torch.load(package / "calls.pt")
    x.numpy().tofile(tmp_path / "x")
    run = [program, package / "model.pt2", tmp_path / "y", "3", f"f32:5x64:{tmp_path / 'x'}"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " ms on " in done.stdout
    found = torch.frombuffer(bytearray((tmp_path / "y").read_bytes()), dtype=torch.float32).view(5, 8)
    torch.testing.assert_close(found, expected)
    short = subprocess.run([*run[:-1], f"f32:6x64:{tmp_path / 'x'}"], capture_output=True, text=True)
    assert short.returncode != 0
    assert "shorter than the input" in short.stderr

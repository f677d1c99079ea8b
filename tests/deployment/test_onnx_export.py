"""ONNX files with our operators: outputs of ONNX Runtime beside the masked model's, sizes, and what is refused."""

import copy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify.kernels.cpu import library

pytest.importorskip("onnxscript", reason="onnxscript is missing: pip install onnxscript")
onnx = pytest.importorskip("onnx", reason="onnx is missing: pip install onnx")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install onnxruntime")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not library.available(), reason=f"no native kernels: {library.why_missing()}"),
]


class Encoder(nn.Module):
    """Two layers, an activation and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(70, 130), nn.Linear(130, 70, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def session(path: Path, n_threads: int = 2) -> "ort.InferenceSession":
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, n_threads
    options.register_custom_ops_library(str(sparsify.native_paths().shared_library))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path: Path, *inputs: torch.Tensor, n_threads: int = 2) -> torch.Tensor:
    made = session(path, n_threads)
    feed = {given.name: x.numpy() for given, x in zip(made.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(made.run(None, feed)[0])


def masked(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    torch.manual_seed(0)
    return sparsify.prune(sparsify.convert(model.eval(), types=_types(model)), sparsity)


def _types(model: nn.Module) -> list[type[nn.Module]] | None:
    return [nn.Conv2d] if any(isinstance(module, nn.Conv2d) for module in model.modules()) else None


@pytest.mark.parametrize("form", ["panel", "bitmask", "gather", "sell"])
@pytest.mark.parametrize("shape", [(1, 70), (9, 70), (2, 33, 70)])
def test_outputs_are_those_of_the_exported_model(form: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    fast = sparsify.export(masked(Encoder()), format=form)
    x = torch.randn(shape)
    sparsify.export_onnx(fast, tmp_path / "model.onnx", x)
    expected = fast(x)
    for n_threads in (1, 2):
        torch.testing.assert_close(outputs(tmp_path / "model.onnx", x, n_threads=n_threads), expected)


@pytest.mark.parametrize("shape", [(9, 70), (32, 12, 70)])
@pytest.mark.parametrize("form", ["panel", "quads", "quadmask", "quadsteps"])
def test_int8_outputs_are_those_of_the_exported_model(form: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    fast = sparsify.export(masked(Encoder()), format=form, quantize="int8", max_error=1.0)
    x = torch.randn(shape)
    sparsify.export_onnx(fast, tmp_path / "model.onnx", x)
    torch.testing.assert_close(outputs(tmp_path / "model.onnx", x), fast(x), rtol=1e-4, atol=1e-4)


def images(kernel: int) -> nn.Sequential:
    """A convolution with all that an exported one computes too, and random statistics."""
    norm = nn.BatchNorm2d(24)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(8, 24, kernel, padding=kernel // 2), norm, nn.ReLU())


@pytest.mark.parametrize("batch", [2, 32])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(kernel: int, batch: int, tmp_path: Path) -> None:
    model = masked(images(kernel))
    x = torch.randn(batch, 8, 11, 13)
    expected = model(x).detach()
    fast = sparsify.export(model, format="panel")
    sparsify.export_onnx(fast, tmp_path / "model.onnx", x)
    found = outputs(tmp_path / "model.onnx", x)
    torch.testing.assert_close(found, fast(x))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_batch_of_images_may_change(kernel: int, tmp_path: Path) -> None:
    fast = sparsify.export(masked(images(kernel)), format="panel")
    batch = torch.export.Dim("batch")
    example = torch.randn(2, 8, 11, 13)
    sparsify.export_onnx(fast, tmp_path / "model.onnx", example, dynamic_shapes=({0: batch},))
    for n in (1, 32):
        x = torch.randn(n, 8, 11, 13)
        torch.testing.assert_close(outputs(tmp_path / "model.onnx", x), fast(x))


def test_sizes_may_change(tmp_path: Path) -> None:
    fast = sparsify.export(masked(Encoder()), format="panel")
    tokens = torch.export.Dim("tokens")
    sparsify.export_onnx(fast, tmp_path / "model.onnx", torch.randn(5, 70), dynamic_shapes=({0: tokens},))
    for n in (1, 5, 300):
        x = torch.randn(n, 70)
        torch.testing.assert_close(outputs(tmp_path / "model.onnx", x), fast(x))


def test_the_file_holds_the_packed_weights_and_nothing_dense(tmp_path: Path) -> None:
    model = masked(nn.Sequential(nn.Linear(512, 512)), 0.9)
    fast = sparsify.export(model, format="panel")
    sparsify.export_onnx(fast, tmp_path / "model.onnx", torch.randn(4, 512))
    packed = sum(tensor.nbytes for tensor in fast[0].tensors) + 4 * 512
    assert packed < (tmp_path / "model.onnx").stat().st_size < packed + 4000
    proto = onnx.load(tmp_path / "model.onnx")
    assert [node.op_type for node in proto.graph.node if node.domain == "sparsify"] == ["Linear"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    fast = sparsify.export(masked(nn.Sequential(nn.Linear(70, 33))), format="panel")
    path = tmp_path / "model.onnx"
    sparsify.export_onnx(fast, path, torch.randn(4, 70))
    proto = onnx.load(path)
    node = next(node for node in proto.graph.node if node.domain == "sparsify")
    index = next(tensor for tensor in proto.graph.initializer if tensor.name == node.input[1])
    changes = {
        "index is damaged": lambda: index.__setattr__("raw_data", bytes(len(index.raw_data))),
        "another version": lambda: _set(node, "interface", 1),
        "out of range": lambda: _set(node, "form", 77),
        "damaged or of another form": lambda: _set(node, "in_features", 2**40),
    }
    for reason, change in changes.items():
        before = copy.deepcopy(proto)
        change()
        onnx.save(proto, path)
        with pytest.raises(Exception, match=reason):
            session(path)
        proto.CopyFrom(before)
        node = next(node for node in proto.graph.node if node.domain == "sparsify")
        index = next(tensor for tensor in proto.graph.initializer if tensor.name == node.input[1])
    onnx.save(proto, path)
    session(path)


def _set(node: "onnx.NodeProto", name: str, number: int) -> None:
    next(attribute for attribute in node.attribute if attribute.name == name).i = number


def test_what_has_no_operator_is_refused(tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", torch.randn(2, 70)
    with pytest.raises(ValueError, match="up: a SparseLinear is not exported yet"):
        sparsify.export_onnx(masked(Encoder()), path, x)
    with pytest.raises(ValueError, match="this layer is 'csr'"):
        sparsify.export_onnx(sparsify.export(masked(Encoder()), format="csr"), path, x)
    half = sparsify.export(masked(Encoder().bfloat16()), format="panel")
    with pytest.raises(ValueError, match=r"in torch\.bfloat16"):
        sparsify.export_onnx(half, path, x.bfloat16())
    assert not path.exists()


def test_the_dense_way_stays_and_is_named(tmp_path: Path) -> None:
    fast, x = sparsify.export(masked(Encoder()), format="panel"), torch.randn(2, 70)
    with pytest.raises(Exception, match=r"sparsify\.export_onnx"):
        torch.onnx.export(fast, (x,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)


def test_a_program_in_cpp_runs_the_file(tmp_path: Path) -> None:
    runtime = next(iter(Path(ort.__file__).parent.glob("capi/libonnxruntime.so.*")), None)
    if runtime is None or not shutil.which("g++"):
        pytest.skip("there is no g++, or this onnxruntime has no shared library of its own")
    program, x = tmp_path / "run_onnx", torch.randn(9, 70)
    fast = sparsify.export(masked(Encoder()), format="panel")
    sparsify.export_onnx(fast, tmp_path / "model.onnx", x)
    proto = onnx.load(tmp_path / "model.onnx")
    for value, name in ((proto.graph.input[0], "x"), (proto.graph.output[0], "y")):
        for node in proto.graph.node:
            for names in (node.input, node.output):
                names[:] = [name if old == value.name else old for old in names]
        value.name = name
    onnx.save(proto, tmp_path / "model.onnx")
    x.numpy().tofile(tmp_path / "x")
    source = Path(__file__).with_name("run_onnx.cpp")
    subprocess.run(["g++", "-std=c++17", source, "-ldl", "-o", program], check=True)
    library_ = sparsify.native_paths().shared_library
    run = [program, runtime, library_, tmp_path / "model.onnx", "9", "70", tmp_path / "x", tmp_path / "y"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = torch.frombuffer(bytearray((tmp_path / "y").read_bytes()), dtype=torch.float32).view(9, 70)
    torch.testing.assert_close(found, fast(x))

"""OpenVINO's packed int8 weights: which layers of a pruned model it takes, as docs/deploy.md says."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify.reporting.dense_engines import openvino_core

CPU = Path("/proc/cpuinfo")

pytest.importorskip("openvino", reason="openvino is missing: pip install openvino")
pytest.importorskip("onnxscript", reason="onnxscript is missing: pip install onnxscript")
pytest.importorskip("onnx", reason="onnx is missing: pip install onnx")
quantization = pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is missing: pip install onnxruntime")

#: What one product of each size is for the threshold below; the weights have 80% zeros.
LAYERS = {(256, 512): "sparse", (512, 100): "dense", (100, 64): "dense"}


class Batches(quantization.CalibrationDataReader):
    def __init__(self, name: str, *batches: torch.Tensor) -> None:
        self.batches = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> object:
        return next(self.batches, None)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """An int8 model of a pruned one, an input, and the answer in float32."""
    folder = tmp_path_factory.mktemp("openvino")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*sizes) for sizes in LAYERS)).eval()
    model = sparsify.to_dense(sparsify.prune(sparsify.convert(model), 0.8))
    x = torch.randn(64, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        torch.onnx.export(model, (x,), folder / "dense.onnx", input_names=["x"], dynamo=True, verbose=False)
        quantization.quantize_static(
            folder / "dense.onnx",
            folder / "int8.onnx",
            Batches("x", x),
            per_channel=True,
            reduce_range=True,  # without VNNI the sums of two products of full range saturate
        )
    return folder / "int8.onnx", x, model(x).detach()


def products(path: Path, x: torch.Tensor, rate: float) -> tuple[list[str], torch.Tensor]:
    """Return what OpenVINO computes the layers with, and the output."""
    compiled = openvino_core().compile_model(str(path), "CPU", {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": rate})
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [str(f["primitiveType"].value) for f in facts if str(f["layerType"].value) == "FullyConnected"]
    return kinds, torch.from_numpy(compiled(x.numpy())[0].copy())


@pytest.mark.parametrize("rate", [0.7, 0.9, 1.0])
def test_it_takes_int8_weights_of_whole_blocks_and_enough_zeros(
    quantized: tuple[Path, torch.Tensor, torch.Tensor], rate: float
) -> None:
    if not CPU.exists():
        pytest.skip("this system does not say which instructions the processor has")
    path, x, expected = quantized
    kinds, found = products(path, x, rate)
    assert (found - expected).norm() < 0.05 * expected.norm()
    if " amx_int8 " not in CPU.read_text():
        assert not any("sparse" in kind for kind in kinds)
        pytest.skip("OpenVINO packs weights on processors with AMX alone, and this one has none")
    wanted = [kind if rate < 0.8 else "dense" for kind in LAYERS.values()]
    assert ["sparse" if "sparse" in kind else "dense" for kind in kinds] == wanted

"""The peers of a sparse layer: dense layers and other libraries, each at its best setting.

A peer makes one callable from a weight (out, in), a bias and an input (tokens, in); the call returns an array of
(tokens, out), perhaps its own output buffer. It uses torch.get_num_threads() threads. Peers need torch.inference_mode.
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import engines

Peer = Callable[[Tensor, Tensor, Tensor], Callable[[], Any]]

_QUANTIZE_WARNINGS = r"(?s).*(torch\.ao\.quantization|quantize_per_tensor|quantized tensor|TypedStorage).*"


def torch_fp32(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Call torch's own layer."""
    layer = _linear(weight, bias)
    return lambda: layer(x)


def torch_bf16(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Call torch's own layer in bfloat16, on bfloat16 input."""
    layer, x = _linear(weight, bias).bfloat16(), x.bfloat16()
    return lambda: layer(x)


def torch_int8(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Call torch's dynamically quantized layer: int8 weights, activations quantized on the way in."""
    layer = quantize(nn.Sequential(_linear(weight, bias)))[0]  # type: ignore[index]
    return lambda: layer(x)


def torch_csr(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Use a CSR weight as torch users do; adding the bias afterwards is faster than giving it to F.linear."""
    csr = _csr(weight)
    return lambda: F.linear(x, csr) + bias


def torch_csr_matmul(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Multiply a CSR weight with the transposed input, torch's faster way; the result stays transposed."""
    csr = _csr(weight)
    return lambda: (csr @ x.t()).t().add_(bias)


#: Peers without a gain from zeros, and peers with one. The best dense fp32 engine is one of ENGINES.
DENSE: dict[str, Peer] = {
    "torch fp32": torch_fp32,
    "torch bf16": torch_bf16,
    "torch int8": torch_int8,
    "onnxruntime": engines.onnxruntime,
    "openvino": engines.openvino,
}
SPARSE: dict[str, Peer] = {"torch csr": torch_csr, "torch csr matmul": torch_csr_matmul}
ENGINES = ("onnxruntime", "openvino")
_REQUIRES = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino",)}

#: Largest error against float64 that an answer may have, as a share of the largest output.
TOLERANCE = {"torch bf16": 2e-2, "torch int8": 5e-2}
FP32_TOLERANCE = 1e-5


def absent() -> dict[str, str]:
    """Return the reason why a peer cannot run here, by peer."""
    reasons = {}
    for name, packages in _REQUIRES.items():
        missing = [package for package in packages if version(package) is None]
        if missing:
            reasons[name] = f"{' and '.join(missing)} not installed; pip install 'sparsify-torch[bench]'"
    if not hasattr(torch.ao.quantization, "quantize_dynamic"):
        reasons["torch int8"] = f"torch {torch.__version__} has no quantize_dynamic"
    return reasons


def dense_peers() -> dict[str, Peer]:
    """Return the DENSE peers with all they need here."""
    return {name: peer for name, peer in DENSE.items() if name not in absent()}


def version(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def quantize(model: nn.Module) -> nn.Module:
    """Return a copy of a model with int8 Linears."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_QUANTIZE_WARNINGS)
        quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
        quantized: nn.Module = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return quantized


def error(answer: Any, right: Tensor) -> float:
    """Return the largest difference from the float64 answer, as a share of its largest value."""
    return float((torch.as_tensor(answer).double() - right).abs().max() / right.abs().max())


def check(name: str, answer: Any, right: Tensor) -> float:
    """Return a candidate's error; raises RuntimeError if it is larger than its number format explains."""
    found, allowed = error(answer, right), TOLERANCE.get(name, FP32_TOLERANCE)
    if not found <= allowed:
        raise RuntimeError(f"{name}: the answer is off by {found:.2g} of the largest output; {allowed:g} is allowed")
    return found


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta").eval()
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return layer


def _csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support is in beta|invariant checks are)")
        csr = weight.to_sparse_csr()
        # int32 indices, as torch's MKL wants them, and half the memory
        return torch.sparse_csr_tensor(csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape)

"""The peers of a sparse layer: dense layers and other libraries, each at its best setting.

A peer has one or more variants. A variant makes a call from a weight (out, in), a bias and an input (tokens, in); the
call returns an array of (tokens, out), perhaps its own output buffer. It uses torch.get_num_threads() threads. Peers
need torch.inference_mode.
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import engines
from benchmarks.int8_peers import INT8, dense
from sparsify.hardware.timing import measure

Peer = Callable[[Tensor, Tensor, Tensor], Callable[[], Any]]


def torch_fp32(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Call torch's own layer."""
    layer = dense(weight, bias)
    return lambda: layer(x)


def torch_bf16(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Call torch's own layer in bfloat16, on bfloat16 input."""
    layer, x = dense(weight, bias).bfloat16(), x.bfloat16()
    return lambda: layer(x)


def torch_csr(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Use a CSR weight as torch users do; adding the bias afterwards is faster than giving it to F.linear."""
    csr = _csr(weight)
    return lambda: F.linear(x, csr) + bias


def torch_csr_matmul(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Multiply a CSR weight with the transposed input, torch's faster way; the result stays transposed."""
    csr = _csr(weight)
    return lambda: (csr @ x.t()).t().add_(bias)


#: Peers without a gain from zeros, by variant, and peers with one.
DENSE: dict[str, dict[str, Peer]] = {
    "torch fp32": {"": torch_fp32},
    "torch bf16": {"": torch_bf16},
    "onnxruntime": {"": engines.onnxruntime},
    "openvino": {"": engines.openvino},
    **INT8,
}
SPARSE: dict[str, Peer] = {"torch csr": torch_csr, "torch csr matmul": torch_csr_matmul}
#: The best dense engine of a kind is one of these or torch; a comparison with it needs at least one of these.
ENGINES = ("onnxruntime", "openvino")
INT8_ENGINES = ("onnxruntime int8", "openvino int8")
_REQUIRES = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino",),
    "onnxruntime int8": ("onnxruntime", "onnx"),
    "openvino int8": ("openvino",),
}
#: Peers too slow to build for many copies of a layer: they are not measured in rotation.
COMPILED = ("torchao int8",)

#: Largest error against float64 that an answer may have, as a share of the largest output. Saturated int8 products
#: were off by .056 and more, others by .023 at most (768x768 to 4096x4096).
TOLERANCE = {
    **dict.fromkeys(("torch bf16", "sparsify bf16"), 2e-2),
    **dict.fromkeys((*INT8, "sparsify int8", "sparsify int8 1x4"), 4e-2),
}
FP32_TOLERANCE = 1e-5


def absent() -> dict[str, str]:
    """Return the reason why a peer cannot run here, by peer."""
    reasons = {}
    for name, packages in _REQUIRES.items():
        missing = [package for package in packages if version(package) is None]
        if missing:
            reasons[name] = f"{' and '.join(missing)} not installed; pip install 'sparsify-torch[bench]'"
    if version("torchao") is None:
        reasons["torchao int8"] = "torchao not installed; pip install torchao"
    if not hasattr(torch.ao.quantization, "quantize_dynamic"):
        reasons["torch int8"] = f"torch {torch.__version__} has no quantize_dynamic"
    return reasons


def dense_peers() -> list[str]:
    """Return the names of the DENSE peers with all they need here."""
    return [name for name in DENSE if name not in absent()]


def fastest(name: str, weight: Tensor, bias: Tensor, x: Tensor) -> tuple[str, Peer]:
    """Return the fastest variant of a dense peer with an acceptable error, and its name, "" if there is one alone.

    Raises RuntimeError if the errors of all are too large.
    """
    variants = DENSE[name]
    if len(variants) == 1:
        return next(iter(variants.items()))
    right = x.double() @ weight.double().t() + bias.double()
    calls, errors = {}, {}
    for variant, make in variants.items():
        if name == "torch int8" and variant not in torch.backends.quantized.supported_engines:
            continue
        call = make(weight, bias, x)
        errors[variant] = error(call(), right)
        if errors[variant] <= TOLERANCE[name]:
            calls[variant] = [call]
    if not calls:
        raise RuntimeError(f"{name}: every variant is off by more than {TOLERANCE[name]:g}: {errors}")
    times = measure(calls, rounds=3)
    best = min(times, key=lambda variant: times[variant].median_s)
    return best, variants[best]


def item_bytes(name: str) -> int:
    """Return the bytes of a weight in a dense peer."""
    return 1 if name in INT8 else 2 if name == "torch bf16" else 4


def version(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def error(answer: Any, right: Tensor) -> float:
    """Return the largest difference from the float64 answer, as a share of its largest value."""
    return float((torch.as_tensor(answer).double() - right).abs().max() / right.abs().max())


def check(name: str, answer: Any, right: Tensor) -> float:
    """Return a candidate's error; raises RuntimeError if it is larger than its number format explains."""
    found, allowed = error(answer, right), TOLERANCE.get(name, FP32_TOLERANCE)
    if not found <= allowed:
        raise RuntimeError(f"{name}: the answer is off by {found:.2g} of the largest output; {allowed:g} is allowed")
    return found


def _csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support is in beta|invariant checks are)")
        csr = weight.to_sparse_csr()
        # int32 indices, as torch's MKL wants them, and half the memory
        return torch.sparse_csr_tensor(csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape)

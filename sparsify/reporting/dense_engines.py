"""Whole dense models in other engines: torch's int8, ONNX Runtime and OpenVINO, in float32 and int8."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.reporting.model_run import Inputs, first_tensor, run

#: Models of more bytes are not exported to ONNX: one file of the format holds 2 GB.
MOST_BYTES = 1_900_000_000

_TORCH_INT8, _ONNXRUNTIME, _ONNXRUNTIME_INT8 = "torch int8", "ONNX Runtime float32", "ONNX Runtime int8"
_OPENVINO, _OPENVINO_INT8 = "OpenVINO float32", "OpenVINO int8"
#: Packages that an engine needs.
_NEEDS = {
    _TORCH_INT8: (),
    _ONNXRUNTIME: ("onnx", "onnxscript", "onnxruntime"),
    _ONNXRUNTIME_INT8: ("onnx", "onnxscript", "onnxruntime"),
    _OPENVINO: ("onnx", "onnxscript", "openvino"),
    _OPENVINO_INT8: ("onnx", "onnxscript", "openvino"),
}
ENGINES = tuple(_NEEDS)


@dataclass(frozen=True)
class Engine:
    """A dense model in an engine: the call, or the reason why there is none.

    error: root mean square of the difference of the first output from torch's float32, as a share of the output's.
    n_bytes: size of the engine's model in a file; None if it has none.
    """

    name: str
    call: Callable[[], Tensor] | None = None
    error: float | None = None
    n_bytes: int | None = None
    why: str = ""


@torch.inference_mode()
def dense_engines(model: nn.Module, inputs: Inputs, folder: Path, without: Collection[str] = ()) -> Iterator[Engine]:
    """Yield the model in each engine, run once on `inputs`; one that is not installed, or fails, with the reason.

    int8 engines round the weights of Linears, with a scale per output, and activations in each call. A call reads
    `inputs` anew: other values may be written into its tensors. The ONNX files are written to `folder`. The model
    stays as it was, and must be in eval mode. without: names of ENGINES to pass by.
    """
    right = first_tensor(run(model, inputs)).float()
    onnx_file = folder / "model.onnx"
    exported = ""
    for name, packages in _NEEDS.items():
        if name in without:
            continue
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            yield Engine(name, why=f"{' and '.join(missing)} not installed")
            continue
        try:
            if packages and not onnx_file.exists():
                exported = exported or _export(model, inputs, onnx_file)
            if packages and exported:
                yield Engine(name, why=exported)
                continue
            yield _MAKERS[name](model, inputs, onnx_file, right)
        except Exception as error:  # any engine may refuse any model
            yield Engine(name, why=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")


def _export(model: nn.Module, inputs: Inputs, file: Path) -> str:
    """Write the model as ONNX; return the reason if it cannot be, else ""."""
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if n_bytes > MOST_BYTES:
        return f"its weights have {n_bytes:,} bytes, and ONNX holds {MOST_BYTES:,} in a file"
    positional, named = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, positional, str(file), kwargs=named, dynamo=True, external_data=False, verbose=False
            )
    except Exception as error:  # the exporter has no type of its own for a model that it cannot trace
        return f"no ONNX: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    return ""


def _engine(name: str, call: Callable[[], Tensor], right: Tensor, file: Path | None = None) -> Engine:
    off = (call().float() - right).norm() / right.norm()
    return Engine(name, call, float(off), file.stat().st_size if file else None)


def _torch_int8(model: nn.Module, inputs: Inputs, file: Path, right: Tensor) -> Engine:
    """Quantize dynamically, by the engine of torch that is fastest with VNNI where there is a choice."""
    before = torch.backends.quantized.engine
    chosen = "onednn" if "onednn" in torch.backends.quantized.supported_engines else before
    quantization: Any = torch.ao.quantization
    torch.backends.quantized.engine = chosen
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = {nn.Linear: quantization.per_channel_dynamic_qconfig}
            quantized = quantization.quantize_dynamic(copy.deepcopy(model), wanted, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before
    torch.save(quantized.state_dict(), file.with_suffix(".pt"))
    return _engine(_TORCH_INT8, lambda: first_tensor(run(quantized, inputs)), right, file.with_suffix(".pt"))


def _onnxruntime(model: nn.Module, inputs: Inputs, file: Path, right: Tensor) -> Engine:
    return _engine(_ONNXRUNTIME, onnxruntime_call(file, inputs), right, file)


def _onnxruntime_int8(model: nn.Module, inputs: Inputs, file: Path, right: Tensor) -> Engine:
    """Quantize dynamically, to 8 bits, or to 7 where sums of products of 8 bits saturate: the more exact of both."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "op_types_to_quantize": ["MatMul", "Gemm", "Gather"],
    }
    made, disabled = [], logging.root.manager.disable
    for bits in (8, 7):
        small = file.with_name(f"int{bits}.onnx")
        logging.disable(logging.WARNING)  # advice about a step for convolutions
        try:
            quantize_dynamic(file, small, reduce_range=bits == 7, **options)
        finally:
            logging.disable(disabled)
        made.append(_engine(_ONNXRUNTIME_INT8, onnxruntime_call(small, inputs), right, small))
    return min(made, key=lambda engine: engine.error or 0.0)


@functools.cache
def openvino_core() -> Any:
    """Return the one Core of OpenVINO in this process, which is never given back.

    Each Core has a stack for signals. Of two at once, the last to go leaves the stack of the other, which is freed: the
    next signal with a handler ends the process.
    """
    import openvino as ov

    return ov.Core()


def _openvino(model: nn.Module, inputs: Inputs, file: Path, right: Tensor) -> Engine:
    return _engine(_OPENVINO, openvino_call(openvino_core().read_model(file), inputs), right, file)


def _openvino_int8(model: nn.Module, inputs: Inputs, file: Path, right: Tensor) -> Engine:
    """Compress the weights to int8; OpenVINO quantizes activations in each call where that is faster."""
    import openvino as ov

    network = openvino_core().read_model(file)
    _compress(network)
    small = file.with_name("int8.xml")
    ov.save_model(network, small, compress_to_fp16=False)
    engine = _engine(_OPENVINO_INT8, openvino_call(network, inputs, DYNAMIC_QUANTIZATION_GROUP_SIZE=128), right)
    n_bytes = sum(part.stat().st_size for part in (small, small.with_suffix(".bin")))
    return Engine(engine.name, engine.call, engine.error, n_bytes)


def _compress(network: Any) -> None:
    """Replace the constant matrix of each product by int8 values and a scale per output."""
    import numpy as np
    from openvino import opset13 as op

    for node in network.get_ordered_ops():
        if node.get_type_name() not in ("MatMul", "Gather"):
            continue
        at = 1 if node.get_type_name() == "MatMul" else 0
        source = node.input_value(at).get_node()
        if source.get_type_name() != "Constant" or len(source.get_output_shape(0)) != 2:
            continue
        weight = source.get_data()
        if weight.dtype != np.float32 or min(weight.shape) < 2:
            continue
        transposed = at == 0 or node.get_attributes()["transpose_b"]
        axis = 1 if transposed else 0
        scale = np.maximum(np.abs(weight).max(axis, keepdims=True), np.finfo(np.float32).tiny) / np.float32(127)
        values = np.rint(weight / scale).astype(np.int8)
        wide = op.multiply(op.convert(op.constant(values), np.float32), op.constant(scale.astype(np.float32)))
        node.input(at).replace_source_output(wide.output(0))


def onnxruntime_call(file: Path, inputs: Inputs) -> Callable[[], Tensor]:
    """Load an ONNX file; return a call on fixed inputs, with torch's threads and all graph optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = dict(zip((x.name for x in session.get_inputs()), _arrays(inputs), strict=True))
    first = [session.get_outputs()[0].name]
    return lambda: torch.from_numpy(session.run(first, feed)[0])


def openvino_call(network: Any, inputs: Inputs, **settings: Any) -> Callable[[], Tensor]:
    """Compile a network of OpenVINO; return a call on fixed inputs, with torch's threads, the rest in float32."""
    import openvino as ov

    latency = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino_core().compile_model(network, "CPU", latency | threads | settings).create_infer_request()
    for number, array in enumerate(_arrays(inputs)):
        request.set_input_tensor(number, ov.Tensor(array, shared_memory=True))

    def call() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


def _arrays(inputs: Inputs) -> list[Any]:
    values = inputs.values() if isinstance(inputs, dict) else inputs
    return [value.numpy() for value in values if isinstance(value, Tensor)]


_MAKERS: dict[str, Callable[[nn.Module, Inputs, Path, Tensor], Engine]] = {
    _TORCH_INT8: _torch_int8,
    _ONNXRUNTIME: _onnxruntime,
    _ONNXRUNTIME_INT8: _onnxruntime_int8,
    _OPENVINO: _openvino,
    _OPENVINO_INT8: _openvino_int8,
}

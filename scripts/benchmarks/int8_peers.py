"""Dense int8 layers of torch, torchao, ONNX Runtime and OpenVINO, each in the variants that are fastest somewhere.

Weights are int8 with a scale per output row, made once. Activations are quantized in each call: "dynamic", their range
found in the call, or "static", with the range of the benchmark's own input given beforehand, the best a calibration
can do. Outputs are float32. Where the processor has no VNNI, sums of products with 8-bit weights saturate in ONNX
Runtime and OpenVINO; in ONNX Runtime's variants with unsigned weights, or with weights of 7 bits, they do not.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.engines import Call, onnxruntime_call, openvino_call

Variants = dict[str, Callable[[Tensor, Tensor, Tensor], Call]]

_QUANTIZE_WARNINGS = r"(?s).*(torch\.ao\.quantization|quantize_per_tensor|quantized tensor|TypedStorage).*"


def torch_dynamic(engine: str, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    """Call torch's dynamically quantized layer, its weight packed by one of torch's engines."""
    layer = quantize(nn.Sequential(dense(weight, bias)), engine)[0]  # type: ignore[index]
    return lambda: layer(x)


def torchao_dynamic(weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    """Call torchao's layer, compiled with frozen weights: on a CPU it is several times slower otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._inductor.config as inductor
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        layer = nn.Sequential(dense(weight.clone(), bias.clone()))
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        torch._dynamo.reset()  # torch.compile gives up on the same code after eight layers
        with torch.inference_mode(False), torch.no_grad(), inductor.patch(freezing=True):
            compiled = torch.compile(layer)
            compiled(x.clone())

    def call() -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return compiled(x)

    return call


def onnxruntime_dynamic(top: int, unsigned: bool, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    """Run DynamicQuantizeMatMul: DynamicQuantizeLinear, MatMulInteger, scales and bias in one node."""
    import onnx

    constants = _onnx_weight(weight, top, unsigned) | {"bias": bias.numpy()}
    names = ["x", "weight", "scale", "zero", "bias"]
    node = onnx.helper.make_node("DynamicQuantizeMatMul", names, ["y"], domain="com.microsoft")
    return onnxruntime_call([node], constants, x, len(weight))


def onnxruntime_static(top: int, unsigned: bool, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    """Run QuantizeLinear and QGemm with a float output: a QDQ graph after its fusion."""
    import onnx

    low, high = _range(x)
    step = np.float32((high - low) / 255 or 1)
    constants = _onnx_weight(weight, top, unsigned)
    constants |= {
        "step": np.asarray(step),
        "x_zero": np.asarray(round(-low / float(step)), np.uint8),
        "bias": np.rint(bias.numpy() / (constants["scale"] * step)).astype(np.int32),
    }
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "step", "x_zero"], ["q"]),
        onnx.helper.make_node(
            "QGemm", ["q", "step", "x_zero", "weight", "scale", "zero", "bias"], ["y"], domain="com.microsoft"
        ),
    ]
    return onnxruntime_call(nodes, constants, x, len(weight))


def openvino_static(weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    """Run MatMul between FakeQuantize, as NNCF writes it: compiled to one int8 product."""
    from openvino import opset13 as op

    parameter = op.parameter(list(x.shape), dtype=np.float32)
    low, high = (np.float32(end) for end in _range(x))
    quantized = op.fake_quantize(parameter, low, high, low, high, 256)
    scale = _int8(weight, 127)[1].numpy()[:, None]
    ends = [op.constant(end) for end in (-128 * scale, 127 * scale)]
    wide = op.fake_quantize(op.constant(weight.numpy()), *ends, *ends, 256)
    product = op.matmul(quantized, wide, False, True)
    return openvino_call(op.add(product, op.constant(bias.numpy())), parameter, x, len(weight))


def openvino_dynamic(group: int, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    """Run MatMul with a compressed int8 weight; activations are quantized in groups where OpenVINO does so."""
    from openvino import opset13 as op

    parameter = op.parameter(list(x.shape), dtype=np.float32)
    values, scale = _int8(weight, 127)
    wide = op.multiply(op.convert(op.constant(values.numpy()), np.float32), op.constant(scale.numpy()[:, None]))
    product = op.matmul(parameter, wide, False, True)
    result = op.add(product, op.constant(bias.numpy()))
    return openvino_call(result, parameter, x, len(weight), DYNAMIC_QUANTIZATION_GROUP_SIZE=group)


#: Peer -> variant -> maker of a call. The fastest variant with an acceptable error stands for the peer.
INT8: dict[str, Variants] = {
    "torch int8": {engine: partial(torch_dynamic, engine) for engine in ("onednn", "x86")},
    "torchao int8": {"dynamic, compiled": torchao_dynamic},
    "onnxruntime int8": {
        f"{kind}{', unsigned' * unsigned}{', 7 bits' * (top == 63)}": partial(make, top, unsigned)
        for kind, make in (("dynamic", onnxruntime_dynamic), ("static", onnxruntime_static))
        for top, unsigned in ((127, False), (63, False), (127, True))
    },
    "openvino int8": {
        "static": openvino_static,
        "dynamic": partial(openvino_dynamic, 128),
    },
}


def dense(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Make torch's layer of these tensors, which it shares."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta").eval()
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return layer


def quantize(model: nn.Module, engine: str) -> nn.Module:
    """Return a copy of a model with int8 Linears, a scale per output row, for one of torch's quantized engines."""
    quantization: Any = torch.ao.quantization
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_QUANTIZE_WARNINGS)
            wanted = {nn.Linear: quantization.per_channel_dynamic_qconfig}
            quantized: nn.Module = quantization.quantize_dynamic(model, wanted, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before
    return quantized


def _int8(weight: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Round a weight (out, in) to int8 up to `top`, with a scale per output row."""
    scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / top
    return torch.round(weight / scale[:, None]).clamp(-top, top).to(torch.int8), scale


def _onnx_weight(weight: Tensor, top: int, unsigned: bool) -> dict[str, NDArray[Any]]:
    values, scale = _int8(weight, top)
    array = values.t().contiguous().numpy()
    if unsigned:
        array = (array.astype(np.int16) + 128).astype(np.uint8)
    zero = np.full(len(weight), 128 if unsigned else 0, array.dtype)
    return {"weight": array, "scale": scale.numpy(), "zero": zero}


def _range(x: Tensor) -> tuple[float, float]:
    return min(0.0, float(x.min())), max(0.0, float(x.max()))

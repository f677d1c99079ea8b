"""Linear layers in ONNX Runtime and OpenVINO, in their fastest setting for repeated calls from one process.

Weights are packed when the layer is built; input and output live in fixed buffers: nothing is allocated or copied.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsify.reporting.dense_engines import openvino_core

Call = Callable[[], Any]


def onnxruntime(weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    """Run one Gemm."""
    import onnx

    node = onnx.helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)
    return onnxruntime_call([node], {"weight": weight.numpy(), "bias": bias.numpy()}, x, len(weight))


def openvino(weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    """Run MatMul and Add."""
    from openvino import opset13 as op

    parameter = op.parameter(list(x.shape), dtype=np.float32)
    product = op.matmul(parameter, op.constant(weight.numpy()), False, True)
    return openvino_call(op.add(product, op.constant(bias.numpy())), parameter, x, len(weight))


def onnxruntime_call(
    nodes: Sequence[Any], constants: Mapping[str, NDArray[Any]], x: Tensor, out: int, sizes: Sequence[int] = ()
) -> Call:
    """Run nodes from "x" to "y", (tokens, out, *sizes): all graph optimizations, input and output bound.

    The threads spin between calls, as by default.
    """
    import onnx
    import onnxruntime as ort

    float32, y_shape = onnx.TensorProto.FLOAT, [x.shape[0], out, *sizes]
    graph = onnx.helper.make_graph(
        nodes,
        "linear",
        [onnx.helper.make_tensor_value_info("x", float32, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", float32, y_shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x, y = x.contiguous(), torch.full(y_shape, torch.nan)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())

    def call(_keep: Tensor = x) -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return call


def openvino_call(result: Any, parameter: Any, x: Tensor, out: int, sizes: Sequence[int] = (), **settings: Any) -> Call:
    """Run a graph with one input and one output, (tokens, out, *sizes): latency hint, one stream.

    What is not quantized is float32; the default would be bfloat16 where the processor has it.
    """
    import openvino as ov

    compiled = openvino_core().compile_model(
        ov.Model([result], [parameter]),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            **settings,
        },
    )
    x, y = x.contiguous(), torch.full((x.shape[0], out, *sizes), torch.nan)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))

    def call(_keep: Tensor = x) -> Tensor:
        request.infer()
        return y

    return call

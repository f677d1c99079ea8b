"""Dense linear layers in ONNX Runtime and OpenVINO, in their fastest setting for repeated calls from one process.

Weights are packed when the layer is built; input and output live in fixed buffers: nothing is allocated or copied.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def onnxruntime(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Run one Gemm, all graph optimizations, input and output bound. Threads spin between calls, as by default."""
    import onnx
    import onnxruntime as ort

    (out, in_), tokens = weight.shape, x.shape[0]
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)],
        "linear",
        [onnx.helper.make_tensor_value_info("x", float32, [tokens, in_])],
        [onnx.helper.make_tensor_value_info("y", float32, [tokens, out])],
        [onnx.numpy_helper.from_array(weight.numpy(), "weight"), onnx.numpy_helper.from_array(bias.numpy(), "bias")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x, y = x.contiguous(), torch.full((tokens, out), torch.nan)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())

    def call(_keep: Tensor = x) -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return call


def openvino(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Any]:
    """Run MatMul and Add, in float32 (the default would be bfloat16 here), latency hint, one stream."""
    import openvino as ov
    from openvino import opset13 as op

    parameter = op.parameter(list(x.shape), dtype=np.float32)
    product = op.matmul(parameter, op.constant(weight.numpy()), False, True)
    compiled = ov.compile_model(
        ov.Model([op.add(product, op.constant(bias.numpy()))], [parameter]),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        },
    )
    x, y = x.contiguous(), torch.full((x.shape[0], weight.shape[0]), torch.nan)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))

    def call(_keep: Tensor = x) -> Tensor:
        request.infer()
        return y

    return call

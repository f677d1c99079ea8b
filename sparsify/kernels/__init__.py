"""Multiplication with packed weights: one operator, one entry per form and device; the reference defines the answer."""

from sparsify.kernels import int8_op as int8_op  # registers its operators
from sparsify.kernels.convolution_op import convolution, fused_convolution
from sparsify.kernels.depthwise_op import depthwise
from sparsify.kernels.forms import (
    FORMS,
    INT8_FORMS,
    PATTERNED,
    fits,
    form_for,
    pack,
    part_names,
    quantizes_inputs,
    supports,
    unpack,
    unpack_as,
)
from sparsify.kernels.geometry import Geometry, Norm
from sparsify.kernels.pointwise_op import pointwise
from sparsify.kernels.torch_ops import ACTIVATIONS, linear

__all__ = [
    "ACTIVATIONS",
    "FORMS",
    "INT8_FORMS",
    "PATTERNED",
    "Geometry",
    "Norm",
    "convolution",
    "depthwise",
    "fits",
    "form_for",
    "fused_convolution",
    "linear",
    "pack",
    "part_names",
    "pointwise",
    "quantizes_inputs",
    "supports",
    "unpack",
    "unpack_as",
]

"""Multiplication with packed weights: one operator, one entry per form and device; the reference defines the answer."""

from sparsify.kernels.forms import FORMS, PATTERNED, fits, form_for, pack, supports, unpack
from sparsify.kernels.pointwise_op import pointwise
from sparsify.kernels.torch_ops import ACTIVATIONS, linear

__all__ = ["ACTIVATIONS", "FORMS", "PATTERNED", "fits", "form_for", "linear", "pack", "pointwise", "supports", "unpack"]

"""The code that multiplies. One operator, one entry per form and device; the reference says what is right."""

from sparsify.kernels.forms import FORMS, PATTERNED, fits, form_for, pack, supports, unpack
from sparsify.kernels.pointwise_op import pointwise
from sparsify.kernels.torch_ops import ACTIVATIONS, linear

__all__ = ["ACTIVATIONS", "FORMS", "PATTERNED", "fits", "form_for", "linear", "pack", "pointwise", "supports", "unpack"]

"""The code that multiplies. One operator, one entry per form and device; the reference says what is right."""

from sparsify.kernels.forms import FORMS, PATTERNED, fits, form_for, pack, supports, unpack
from sparsify.kernels.ops import ACTIVATIONS, linear
from sparsify.kernels.pointwise import pointwise

__all__ = ["ACTIVATIONS", "FORMS", "PATTERNED", "fits", "form_for", "linear", "pack", "pointwise", "supports", "unpack"]

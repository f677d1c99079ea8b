"""The layers: those that train under a mask (Masked), and those that run what is left (Packed), of each kind.

LayeredAttention and LayeredEncoder are torch's attention and its encoder, laid out so that they call such layers.
"""

from sparsify.layers.attention import LayeredAttention
from sparsify.layers.csr_conv2d import CSRConv2d
from sparsify.layers.csr_linear import CSRLinear
from sparsify.layers.encoder import LayeredEncoder
from sparsify.layers.masked import Masked
from sparsify.layers.packed import Packed
from sparsify.layers.sparse_conv2d import SparseConv2d
from sparsify.layers.sparse_linear import SparseLinear
from sparsify.layers.tied import Tied

__all__ = [
    "CSRConv2d",
    "CSRLinear",
    "LayeredAttention",
    "LayeredEncoder",
    "Masked",
    "Packed",
    "SparseConv2d",
    "SparseLinear",
    "Tied",
]

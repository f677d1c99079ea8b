"""The layers: SparseLinear and its kin (Masked), which train under a mask, and CSRLinear, which runs what is left.

LayeredAttention and LayeredEncoder are torch's attention and its encoder, laid out so that they call such layers.
"""

from sparsify.layers.attention import LayeredAttention
from sparsify.layers.csr_linear import CSRLinear
from sparsify.layers.encoder import LayeredEncoder
from sparsify.layers.masked import Masked
from sparsify.layers.sparse_linear import SparseLinear
from sparsify.layers.tied import Tied

__all__ = ["CSRLinear", "LayeredAttention", "LayeredEncoder", "Masked", "SparseLinear", "Tied"]

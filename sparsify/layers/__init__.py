"""The layers: SparseLinear and its kin (Masked), which train under a mask, and CSRLinear, which runs what is left."""

from sparsify.layers.csr_linear import CSRLinear
from sparsify.layers.masked import Masked
from sparsify.layers.sparse_linear import SparseLinear

__all__ = ["CSRLinear", "Masked", "SparseLinear"]

"""The two layers: SparseLinear, which trains under a mask, and CSRLinear, which runs what is left."""

from sparsify.layers.csr_linear import CSRLinear
from sparsify.layers.sparse_linear import SparseLinear

__all__ = ["CSRLinear", "SparseLinear"]

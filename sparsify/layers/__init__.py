"""Masked layers for training, and packed layers for inference; embeddings with int8 rows.

UnfusedAttention and UnfusedEncoder are torch's attention and encoder, with their products as child layers.
"""

from sparsify.layers.attention import UnfusedAttention
from sparsify.layers.csr_convolution import CSRConv1d, CSRConv2d
from sparsify.layers.csr_linear import CSRLinear
from sparsify.layers.depthwise import DepthwiseConv2d
from sparsify.layers.encoder import UnfusedEncoder
from sparsify.layers.int8_embedding import Int8Embedding
from sparsify.layers.masked import MaskedLayer
from sparsify.layers.max_pool import MaxPool2d
from sparsify.layers.packed import PackedLayer
from sparsify.layers.sparse_convolution import SparseConv2d
from sparsify.layers.sparse_linear import SparseLinear
from sparsify.layers.tied import Tied

__all__ = [
    "CSRConv1d",
    "CSRConv2d",
    "CSRLinear",
    "DepthwiseConv2d",
    "Int8Embedding",
    "MaskedLayer",
    "MaxPool2d",
    "PackedLayer",
    "SparseConv2d",
    "SparseLinear",
    "Tied",
    "UnfusedAttention",
    "UnfusedEncoder",
]

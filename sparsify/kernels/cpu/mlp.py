"""Two linear layers of one form as one call of the native kernels; what is between them stays in the caches."""

import ctypes
import math
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify.kernels.cpu import library
from sparsify.kernels.cpu.memory import empty

_MLP_CALL = struct.Struct("=30q")  # struct sparsify_mlp_call
_mlp: Any = None
_pack_call = _MLP_CALL.pack
if library.available():
    _mlp = library.function("sparsify_mlp", (ctypes.c_int, [ctypes.c_int, ctypes.c_int, ctypes.c_char_p]))


class Layer(NamedTuple):
    """A linear layer: index and values of a weight (out, in), for int8 values a scale; the number of an activation."""

    parts: tuple[Tensor, ...]
    shape: tuple[int, int]
    bias: Tensor | None
    activation: int


def mlp(x: Tensor, first: Layer, second: Layer, form: str) -> Tensor:
    """Apply two layers to x (..., in): a tensor (..., out), the same bits as two calls of `library.linear`.

    x, both biases and float values share a dtype of library.DTYPES; both layers have the form "panel" or one that
    quantises inputs, and int8 values, or none. Trusts index and values.
    """
    *leading, n_in = x.shape
    flat = x if x.is_contiguous() else x.contiguous()
    tokens, n_out = math.prod(leading), second.shape[0]
    y = empty((*leading, n_out), x.dtype)
    call = _pack_call(
        *_fields(first, flat.data_ptr(), n_in, 0, 0, tokens),
        *_fields(second, 0, 0, y.data_ptr(), n_out, tokens),
        *(layer.parts[2].data_ptr() if layer.parts[2:] else 0 for layer in (first, second)),
    )
    if status := _mlp(library.FORM_NUMBERS[form], library.DTYPES[x.dtype], call):
        library.checked(status)
    return y


def _fields(layer: Layer, x: int, x_stride: int, y: int, y_stride: int, tokens: int) -> tuple[int, ...]:
    """Return the fields of a struct sparsify_linear_call."""
    n_out, n_in = layer.shape
    bias = 0 if layer.bias is None else layer.bias.data_ptr()
    pointers = layer.parts[0].data_ptr(), layer.parts[1].data_ptr(), bias, x, x_stride, y, y_stride
    return *pointers, tokens, n_out, n_in, layer.activation, torch.get_num_threads(), 0, n_out

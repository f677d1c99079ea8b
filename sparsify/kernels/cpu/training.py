"""Native functions for training behind tensors: gradients of kept weights, Cholesky factors, masked weights cleared."""

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.cpu.library import available, checked, function

_SDDMM_CALL = struct.Struct("=12q")  # struct sparsify_sddmm_call
_FACTOR_CALL = struct.Struct("=7q")  # struct sparsify_factor_call
_SDDMM_TOKENS = 256  # SPARSIFY_SDDMM_TOKENS

_sddmm: Any = None
_factor: Any = None
_clear: Any = None
_hides: Any = None
if available():
    _int, _pointer = ctypes.c_int, ctypes.c_void_p
    _sddmm = function("sparsify_sddmm", (_int, [ctypes.c_char_p]))
    _factor = function("sparsify_factor_parts", (_int, [ctypes.c_char_p]))
    _clear = function("sparsify_clear_masked", (_int, [_pointer, _pointer, ctypes.c_int64, _int, _int]))
    _hides = function("sparsify_hides_values", (_int, [_pointer, _pointer, ctypes.c_int64, _int, _int]))


def weight_grad(grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, out: Tensor) -> None:
    """Write grad.T @ x at the entries of a CSR matrix that pack accepts, into `out` (out, in); float32.

    grad is (tokens, out), x (tokens, in), with a token at least; crow and col are int32. Other entries of `out` stay.
    """
    n_out, n_in = out.shape
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    workspace = grad.new_empty(min(len(x) + 16, _SDDMM_TOKENS) * (n_in + n_out))
    status = _sddmm(
        _SDDMM_CALL.pack(
            grad.data_ptr(),
            grad.stride(0),
            x.data_ptr(),
            x.stride(0),
            crow.data_ptr(),
            col.data_ptr(),
            out.data_ptr(),
            workspace.data_ptr(),
            len(x),
            n_out,
            n_in,
            torch.get_num_threads(),
        )
    )
    if status:
        checked(status)


def factor_parts(matrix: Tensor, order: Tensor, lower: Tensor) -> None:
    """Write the lower Cholesky factor of parts of a contiguous symmetric matrix (n, n) into `lower`.

    order: int64 (parts, size), the rows and columns of each part; n - 1 stands for a row of the identity.
    lower: (parts, size, size), zero above the diagonal; NaN for a part that is not positive definite.
    All are float32 without gaps.
    """
    n_parts, size = order.shape
    pointers = matrix.data_ptr(), order.data_ptr(), lower.data_ptr()
    if status := _factor(_FACTOR_CALL.pack(*pointers, len(matrix), n_parts, size, torch.get_num_threads())):
        checked(status)


def can_clear(values: Tensor, mask: Tensor) -> bool:
    """Return whether `clear_masked` takes these: plain tensors on the CPU, contiguous and of one shape."""
    return (
        available()
        and type(values) in (Tensor, torch.nn.Parameter)
        and values.is_cpu
        and mask.is_cpu
        and mask.dtype == torch.bool
        and values.shape == mask.shape  # what the kernel goes by is one count for both
        and values.dtype.itemsize in (2, 4, 8)
        and values.is_contiguous()
        and mask.is_contiguous()
        and not torch.compiler.is_compiling()
    )


def clear_masked(values: Tensor, mask: Tensor) -> None:
    """Set values to zero at False of a bool mask, in place; only changed values are written."""
    if status := _clear(
        values.data_ptr(), mask.data_ptr(), values.numel(), values.element_size(), torch.get_num_threads()
    ):
        checked(status)
    torch.autograd.graph.increment_version(values)


def hides_values(values: Tensor, mask: Tensor) -> bool:
    """Return whether any value at False of a bool mask has a bit set: one reading of both, for `can_clear` tensors."""
    return bool(
        checked(
            _hides(values.data_ptr(), mask.data_ptr(), values.numel(), values.element_size(), torch.get_num_threads())
        )
    )

"""Observers of a call: transforms, traces, modes and profilers of torch, and tensors with operators of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = {Tensor}


def is_transformed() -> bool:
    """Return whether torch differentiates forwards, or runs one of torch.func's transforms.

    The operators know neither, and would lose tangents; torch's own, on the unpacked weight, know both.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def check_no_tangent(*operands: Tensor | None) -> None:
    """Raise RuntimeError for an operand of forward-mode differentiation: its tangent would be lost."""
    if forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        return
    if any(operand is not None and forward_ad.unpack_dual(operand).tangent is not None for operand in operands):
        raise RuntimeError(
            "the operators of sparse layers have no forward-mode derivative; call the exported layers themselves, "
            "which have one"
        )


def is_watched() -> bool:
    """Return whether anybody sees which operators run: a trace, a mode of torch's, or a profiler."""
    return bool(
        torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or _profiler_enabled()
    )


def are_plain(x: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None) -> bool:
    """Return whether all operands are tensors with memory of their own, and not of a class with its own operators."""
    of_bias = type(bias)
    return {type(x), *map(type, parts)} == _PLAIN and (bias is None or of_bias is Parameter or of_bias is Tensor)

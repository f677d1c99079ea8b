"""The precision of a training's passes: float32, or bfloat16 on request with the weights in float32."""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from sparsify.errors import SlowBfloat16Warning
from sparsify.layers import MaskedLayer

#: Tokens of a sequence from which on torch's attention in bfloat16 is the faster one on a CPU, forwards and backwards.
_LONG = 1024


def check_bfloat16(layers: Mapping[str, MaskedLayer]) -> None:
    """Raise ValueError, naming the layer, for layers that bfloat16 does not make faster: those not in float32.

    A SlowBfloat16Warning tells of a processor that has no instructions for it.
    """
    for name, layer in layers.items():
        if layer.weight.dtype != torch.float32:
            raise ValueError(f"{name}: bfloat16 is for layers in float32, got {layer.weight.dtype}; leave it out")
    if any(layer.weight.is_cpu for layer in layers.values()) and not multiplies_bfloat16():
        warnings.warn(
            "bfloat16=True makes a training much slower on this processor, which has no instructions for products in "
            "bfloat16; leave it out",
            SlowBfloat16Warning,
            stacklevel=3,
        )


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions for products in bfloat16 that torch uses."""
    if platform.machine().lower() in ("x86_64", "amd64"):  # where torch says so of AVX-512 without them too
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


@contextlib.contextmanager
def computing(device: torch.device, *, bfloat16: bool) -> Iterator[None]:
    """Inside the block, compute products in bfloat16 if asked for: a context for the forward passes of a training."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        if bfloat16 and device.type == "cpu":
            with _ShortAttention(), lstms_that_run():
                yield
        else:
            yield


def lstms_that_run() -> contextlib.AbstractContextManager[Any]:
    """Return a context for bfloat16 autocast on a CPU: LSTMs are float32 where torch has no bfloat16 for them."""
    return contextlib.nullcontext() if _has_bfloat16_lstm() else _LSTMInFloat32()


@functools.cache
def _has_bfloat16_lstm() -> bool:
    """Return whether torch can train an LSTM in bfloat16 here: on x86 that takes AVX-512."""
    x, weights = torch.zeros(1, 1, 1), [torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4), torch.zeros(4)]
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.lstm(x, (x, x), weights, True, 1, 0.0, True, False, False)
    except RuntimeError:
        return False
    return True


class _LSTMInFloat32(TorchFunctionMode):
    """Compute LSTMs in float32."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not torch.lstm:
            return function(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return function(*tree_map(_wide, args), **tree_map(_wide, kwargs or {}))


class _ShortAttention(TorchFunctionMode):
    """Compute the attention of short sequences by products of their own, where a backward pass follows.

    torch's own function is slow backwards on a CPU in bfloat16, and in float32 slower than explicit products in
    bfloat16, as autocast has them.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and torch.is_grad_enabled():
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Compute F.scaled_dot_product_attention; of less than _LONG tokens by its parts, which have no dropout."""
    if key.shape[-2] >= _LONG or dropout_p or (attn_mask is not None and (is_causal or not _all_see(attn_mask))):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if options.get("enable_gqa"):
        n_alike = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(n_alike, -3) for tensor in (key, value))
    scale = options.get("scale")
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -math.inf)
    if attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    return torch.softmax(scores, -1) @ value


def _all_see(mask: Tensor) -> bool:
    """Return whether each row of a mask leaves something to see: a softmax of nothing is NaN, torch's attention 0."""
    return bool(((mask if mask.dtype == torch.bool else mask > -math.inf).any(-1)).all())


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

"""Two linear layers with an activation between in one call, for inference: what is between stays in the caches."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.cpu import library
from sparsify.kernels.cpu import mlp as native
from sparsify.kernels.cpu.mlp import Layer
from sparsify.kernels.torch_ops import _ACTIVATION_IDS, operands

#: Tokens for each thread: fewer keep threads idle, or tiles narrow.
FEWEST_TOKENS = 64
#: Inputs and outputs: of more, those of a tile of 64 tokens are over 1 MB and leave the caches. Forms that quantise
#: inputs keep all that is between the layers, mostly four times as much, until the last of it is known.
MOST_ENDS = {"panel": 4096, **dict.fromkeys(("quads", "quadmask", "quadsteps"), 2048)}


def layer(parts: tuple[Tensor, ...], shape: tuple[int, int], bias: Tensor | None, activation: str) -> Layer:
    """Return a layer for `mlp`: the tensors of its weight (out, in), and one of the ACTIVATIONS."""
    return Layer(parts, shape, bias, _ACTIVATION_IDS[activation])


def is_worthwhile(form: str, tokens: int, ends: int) -> bool:
    """Return whether there is a kernel for two layers of a form, and one call takes less time than two.

    ends: the first layer's inputs and the second one's outputs.
    """
    return ends <= MOST_ENDS.get(form, 0) and tokens >= FEWEST_TOKENS * torch.get_num_threads()


def mlp(x: Tensor, first: Layer, second: Layer, form: str) -> Tensor | None:
    """Apply two layers of a form to x (..., in): (..., out), bit for bit what one after the other gives.

    Without gradients. Returns None if the kernel does not take these tensors.
    """
    fits = x.is_cpu and x.dtype in library.DTYPES and x.dim() > 0 and x.shape[-1] == first.shape[1]
    if not fits or first.shape[0] != second.shape[1] or len(first.parts) != len(second.parts):
        return None
    if not (_takes(first, x) and _takes(second, x)):
        return None
    return native.mlp(x, _usable(first, form), _usable(second, form), form)


def _takes(layer: Layer, x: Tensor) -> bool:
    """Return whether the tensors of a layer fit x."""
    values, scale, bias = layer.parts[1], layer.parts[2:], layer.bias
    return (
        values.dtype == (torch.int8 if scale else x.dtype)
        and all(part.is_cpu for part in layer.parts)
        and all(s.dtype == torch.float32 and s.shape == (layer.shape[0],) for s in scale)
        and (bias is None or (bias.is_cpu and bias.dtype == x.dtype and bias.shape == (layer.shape[0],)))
    )


def _usable(layer: Layer, form: str) -> Layer:
    """Return the layer with tensors as a kernel reads them."""
    index, values, *scale = layer.parts
    index, values, bias = operands(form, index, values, layer.bias, layer.shape)
    return layer._replace(parts=(index, values, *(s.contiguous() for s in scale)), bias=bias)

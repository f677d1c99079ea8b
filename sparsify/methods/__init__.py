"""What is worth keeping: a method gives every weight a score, larger = more worth keeping.

A method is a function `(weight) -> scores`, or `(weight, *, seed) -> scores` if it draws random numbers; scores are a
floating tensor of the weight's shape. To use your own, pass the function itself: `prune(model, 0.5, method=mine)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.methods.magnitude import magnitude
from sparsify.methods.random import random

__all__ = ["METHODS", "Method", "score"]

Method = Callable[..., Tensor]

METHODS: dict[str, Method] = {"magnitude": magnitude, "random": random}


def resolve_method(method: str | Method) -> Method:
    """Return the function behind a method's name; a function is returned as it is."""
    if callable(method):
        return method
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of: {', '.join(METHODS)}; or pass your own function")
    return METHODS[method]


def takes_seed(method: Method) -> bool:
    """Say whether a method draws random numbers, that is, has a `seed` parameter."""
    try:
        return "seed" in inspect.signature(method).parameters
    except ValueError:  # torch.abs and its like are written in C and have no signature
        return False


def score(name: str, weight: Tensor, method: str | Method, seed: int | None = None) -> Tensor:
    """Score the weight (out, in) of the layer called `name`.

    A seed is mixed with the name, so that layers of one shape do not get one mask. Raises ValueError if a seed is given
    to a method that draws nothing, if the weight or a score is not finite, or if the scores have another shape.
    """
    chosen = resolve_method(method)
    label = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    where = f"{name}: " if name else ""
    if weight.is_meta:
        raise ValueError(f"{where}the weight is on the meta device and has no data; load the model's weights first")
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{where}the weight holds NaN or Inf; mend it"
            + (f", or leave the layer out with exclude=[{name!r}]" if name else "")
        )
    if takes_seed(chosen):
        scores = chosen(weight.detach(), seed=_mix(seed or 0, name))
    elif seed is not None:
        raise ValueError(f"seed={seed} has no effect with method {label!r}, which draws no random numbers")
    else:
        scores = chosen(weight.detach())
    if scores.shape != weight.shape or not scores.is_floating_point():
        raise ValueError(
            f"{where}method {label!r} must return floating scores of shape {tuple(weight.shape)}, "
            f"got {scores.dtype} {tuple(scores.shape)}"
        )
    if not torch.isfinite(scores).all():
        raise ValueError(f"{where}method {label!r} returned a score that is NaN or Inf")
    return scores


def _mix(seed: int, name: str) -> int:
    """Derive one seed per layer (FNV-1a over the name): the same in every process and on every machine."""
    mixed = (0xCBF29CE484222325 ^ seed) % 2**64
    for byte in name.encode():
        mixed = ((mixed ^ byte) * 0x100000001B3) % 2**64
    return mixed % 2**63

"""Scores of one layer's weight by any method, checked; and the checks and seeds around it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify.masking.methods.registry import (
    TRAINING_STATISTICS,
    Method,
    method_label,
    required_statistics,
    resolve_method,
    takes,
    takes_seed,
)


def score(
    name: str,
    weight: Tensor,
    method: str | Method,
    seed: int | None = None,
    gram: Tensor | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Score the weight (out, in) of the layer called `name`.

    gram: the Gram matrix (in, in), for calibrated methods
    statistics: by name, for methods with TRAINING_STATISTICS
    seed: for methods with random numbers; mixed with the name: layers of one shape get different masks

    Raises ValueError if the data or the statistics of the method are missing, if the weight or a score is not finite,
    or if the scores have another shape.
    """
    function, label = resolve_method(method), method_label(method)
    where = f"{name}: " if name else ""
    check_finite(name, weight)
    options: dict[str, object] = {}
    if takes(method, "gram"):
        if gram is None:
            raise ValueError(f"{where}method {label!r} needs calibration data: sparsify.prune(model, ..., data=...)")
        options["gram"] = gram
    for key in sorted(required_statistics(method)):
        if key not in (statistics or {}):
            raise ValueError(
                f"{where}method {label!r} needs {TRAINING_STATISTICS[key]}; follow a recipe with sparsify.Pruner, "
                "after at least one step of training or with its argument 'loss'"
            )
        options[key] = (statistics or {})[key]
    if takes_seed(method):
        options["seed"] = mix_seed(seed or 0, name)
    scores = function(weight.detach(), **options)
    if scores.shape != weight.shape or not scores.is_floating_point():
        raise ValueError(
            f"{where}method {label!r} must return floating scores of shape {tuple(weight.shape)}, "
            f"got {scores.dtype} {tuple(scores.shape)}"
        )
    if not torch.isfinite(scores).all():
        raise ValueError(f"{where}method {label!r} returned a score that is NaN or Inf")
    return scores


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError, naming the layer, if a weight has no data or holds NaN or Inf."""
    where = f"{name}: " if name else ""
    if weight.is_meta:
        raise ValueError(f"{where}the weight is on the meta device and has no data; load the model's weights first")
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{where}the weight holds NaN or Inf; mend it"
            + (f", or leave the layer out with exclude=[{name!r}]" if name else "")
        )


def check_memory(name: str, weight: Tensor) -> None:
    """Raise ValueError, naming the layer, if entries of a weight share memory: none can be set alone."""
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        where = f"{name}: " if name else ""
        raise ValueError(
            f"{where}entries of the weight share memory (it is an expanded tensor), so that none can be removed alone; "
            "give the layer a weight of its own: nn.Parameter(weight.detach().clone())"
        )


def mix_seed(seed: int, name: str) -> int:
    """Derive the seed of a layer (FNV-1a over its name): the same in every process and on every machine."""
    mixed = (0xCBF29CE484222325 ^ seed) % 2**64
    for byte in name.encode():
        mixed = ((mixed ^ byte) * 0x100000001B3) % 2**64
    return mixed % 2**63

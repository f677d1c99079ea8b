"""Quality of a model before and after, measured by a user's own function (--eval)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from sparsify.cli.user_code import load_function
from sparsify.offload.journal import Journal
from sparsify.offload.lazy_safetensors import LazySafetensors
from sparsify.offload.streaming import offloaded
from sparsify.tables import Table

Qualities = dict[str, float]


def evaluation(path: str) -> Callable[[nn.Module], Qualities]:
    """Return the user's function "module:function" as one from a model to its qualities by name."""
    function = load_function(path, f"--eval {path}")

    def evaluate(model: nn.Module) -> Qualities:
        with torch.inference_mode():
            returned = function(model)
        try:
            named = returned.items() if isinstance(returned, dict) else [("quality", returned)]
            return {str(key): float(value) for key, value in named}
        except (TypeError, ValueError):
            raise ValueError(f"--eval {path}: must return a number or a dict of numbers, got {returned!r}") from None

    return evaluate


def evaluate_offloaded(
    evaluate: Callable[[nn.Module], Qualities],
    model: nn.Module,
    weights: LazySafetensors | None,
    journal: Journal | None,
) -> Qualities:
    """Evaluate a model, with its weights on disk if they are there."""
    if weights is None:
        return evaluate(model)
    with offloaded(model, weights, journal) as running:
        qualities = evaluate(running)
    if lost := [key for key, value in qualities.items() if math.isnan(value)]:
        raise ValueError(
            f"--eval: {lost[0]!r} is NaN. With --stream a weight is in memory only while its own module runs, and "
            "elsewhere NaN: evaluate with calls of the model alone, or leave --eval out and evaluate the file"
        )
    return qualities


def quality_table(dense: Qualities, sparse: Qualities) -> str:
    """Lay out qualities before and after."""
    lines = [(key, f"{dense[key]:.4g}", f"{value:.4g}") for key, value in sparse.items() if key in dense]
    return Table(("quality", "dense", "sparse"), lines).text()

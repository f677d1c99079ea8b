"""The layers of a model in each group of a recipe."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from sparsify.conversion.convert import plan_convert, sparse_layers
from sparsify.layers import MaskedLayer
from sparsify.masking.spec import check_spec
from sparsify.recipes.schema import HOLD, Recipe


def assign_layers(recipe: Recipe, model: nn.Module) -> list[dict[str, Tensor]]:
    """Return, for each group, its layers and their weights (out, in); the model is not changed.

    The model may be converted or not. Raises ValueError if a pattern matches nothing, if two groups claim one layer, or
    if a target cannot be met exactly.
    """
    owner: dict[str, int] = {}
    groups = []
    for number, group in enumerate(recipe.groups):
        where = f"groups.{number}"
        try:
            weights = plan_convert(model, include=group.layers, exclude=group.exclude, tied="skip").weights
            shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
            if not shapes:
                raise ValueError("no layer is left after 'exclude'")
            if group.method != HOLD:
                check_spec(group.spec(), shapes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for name in shapes:
            if name in owner:
                raise ValueError(f"{where}: {name!r} is already in groups.{owner[name]}; a layer belongs to one group")
            owner[name] = number
        groups.append(weights)
    return groups


def converted_layers(model: nn.Module, names: Iterable[str]) -> dict[str, MaskedLayer]:
    """Return the masked layers of these names. Raises ValueError for a layer not converted."""
    layers = sparse_layers(model)
    chosen = {}
    for name in names:
        if name not in layers:
            raise ValueError(f"{name}: not converted; call sparsify.convert(model) first")
        chosen[name] = layers[name]
    return chosen

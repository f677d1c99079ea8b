"""The layers of a model in each group of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from sparsify.conversion.convert import convert, plan_convert, sparse_layers
from sparsify.conversion.converters.table import converter_for, dense_types
from sparsify.conversion.module_surgery import Model
from sparsify.layers import MaskedLayer
from sparsify.masking.spec import check_spec
from sparsify.recipes.schema import HOLD, Group, Recipe


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
            weights = plan_convert(model, **selection(group), tied="skip").weights
            if group.types is not None:
                weights = {name: weight for name, weight in weights.items() if _was_of(model, name, group.types)}
            shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
            if not shapes:
                raise ValueError("no layer is left after 'exclude' and 'types'")
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


def selection(group: Group) -> dict[str, Any]:
    """Return the arguments of `convert` for the layers of a group."""
    types = None if group.types is None else dense_types(group.types)
    return {"include": group.layers, "exclude": group.exclude, "types": types}


def convert_by_recipe(model: Model, recipe: Recipe, **options: Any) -> Model:
    """Convert the layers of all groups of a recipe, in place; options are those of `convert`."""
    for group in recipe.groups:
        convert(model, **selection(group), **options)
    return model


def _was_of(model: nn.Module, name: str, types: Sequence[str]) -> bool:
    """Return whether a layer, masked or not, is or was of one of these types, or is inside a module that was."""
    wanted = dense_types(types)
    path = name.split(".")
    for end in range(len(path) + 1):
        try:
            converter = converter_for(model.get_submodule(".".join(path[:end])))
        except AttributeError:  # a layer of a module that is not taken apart yet
            continue
        if converter is not None and converter.dense in wanted:
            return True
    return False


def converted_layers(model: nn.Module, names: Iterable[str]) -> dict[str, MaskedLayer]:
    """Return the masked layers of these names. Raises ValueError for a layer not converted."""
    layers = sparse_layers(model)
    chosen = {}
    for name in names:
        if name not in layers:
            raise ValueError(f"{name}: not converted; call sparsify.convert(model) first")
        chosen[name] = layers[name]
    return chosen

"""A recipe followed at one moment: each group's masks at once, with or without calibration data."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sparsify.conversion.convert import sparse_layers
from sparsify.conversion.module_surgery import Model
from sparsify.conversion.transaction import Transaction
from sparsify.masking.masks import is_empty, warn_removed_whole
from sparsify.masking.spec import LayerSpec, PruningSpec, layer_specs
from sparsify.pruning.oneshot import prune_with_specs
from sparsify.pruning.prune import set_masks
from sparsify.pruning.recover import recover
from sparsify.recipes.assignment import assign_layers
from sparsify.recipes.group_masks import group_masks
from sparsify.recipes.schema import HOLD, Recipe


def apply(
    model: Model,
    recipe: Recipe,
    *,
    data: Iterable[Any] | None = None,
    cache_bytes: int | None = None,
    progress: bool = False,
) -> Model:
    """Prune a converted model by the recipe, now, in place, and return the model.

    data: calibration batches, as for `prune`; all groups are then pruned in one pass through the layers
    cache_bytes, progress: as for `prune`, and for `recover`

    With a `recover` stage, a copy of the model before the pruning is the teacher. Raises ValueError if a schedule needs
    training (use a Pruner in the training loop), or a group data, before any mask is changed. After any error the model
    is as it was.
    """
    check_applicable(recipe, has_data=data is not None)
    options: dict[str, Any] = {"cache_bytes": cache_bytes, "progress": progress}
    if recipe.recover is not None:
        assert data is not None
        data, teacher = list(data), copy.deepcopy(model)
        plain = recipe.model_copy(update={"recover": None})
        with Transaction(model) as undo:
            undo.keep((*model.parameters(), *model.buffers()))
            apply(model, plain, data=data, **options)
            return recover(model, teacher, data, **recover_options(recipe, model), **options)
    if data is not None:
        prune_with_specs(model, _group_specs(recipe, model), data, reconstruct=recipe.reconstruction, **options)
        return model
    if cache_bytes is not None:
        raise ValueError(f"cache_bytes={cache_bytes} has no effect without data; give data=...")
    masks: dict[str, Tensor] = {}
    for group, weights in zip(recipe.groups, assign_layers(recipe, model), strict=True):
        of_group = group_masks(model, group, list(weights))
        if group.method != HOLD:
            warn_removed_whole({name: is_empty(mask) for name, mask in of_group.items()}, group.spec())
        masks |= of_group
    layers = sparse_layers(model)
    set_masks(model, {layers[name]: mask for name, mask in masks.items()})
    return model


def recover_options(recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """Return the arguments of `recover` for a recipe's stage; held layers keep their masks."""
    assert recipe.recover is not None
    options = recipe.recover.model_dump()
    if options.pop("move"):
        groups = zip(recipe.groups, assign_layers(recipe, model), strict=True)
        options["move"] = {name: g.pattern for g, names in groups if g.method != HOLD for name in names}
    return options


def check_applicable(recipe: Recipe, *, has_data: bool) -> None:
    """Raise ValueError if `apply` cannot follow a recipe, in any model: a group trains, or needs data."""
    for number, group in enumerate(recipe.groups):
        if group.trains:
            raise ValueError(
                f"groups.{number}: method {group.method!r} with a {group.schedule.kind} schedule is followed while "
                "training; use sparsify.Pruner(model, recipe) in the loop, or a recipe with a constant schedule"
            )
        if not has_data and group.needs_data:
            raise ValueError(
                f"groups.{number}: {group.needs_data} needs calibration data: sparsify.apply(..., data=...)"
            )
    for stage in ("reconstruct", "recover"):
        if getattr(recipe, stage) is not None and not has_data:
            raise ValueError(f"{stage} needs calibration data: sparsify.apply(..., data=...)")


def recipe_layer_specs(recipe: Recipe, model: nn.Module) -> dict[str, LayerSpec]:
    """Return the specification of each layer of a converted model, from shapes alone; the model may be on meta.

    Raises ValueError for a measured allocation, a group with a training, and a group of held layers.
    """
    for number, group in enumerate(recipe.groups):
        if group.trains or group.method == HOLD:
            raise ValueError(
                f"groups.{number}: takes more than one look at calibration data; prune the model in memory"
            )
    layers = sparse_layers(model)
    specs: dict[str, LayerSpec] = {}
    for spec, names in _group_specs(recipe, model):
        shapes = {name: layers[name].shape for name in names}
        of_group = layer_specs(spec, shapes)
        warn_removed_whole({name: layer.empties(shapes[name]) for name, layer in of_group.items()}, spec)
        specs |= of_group
    return specs


def _group_specs(recipe: Recipe, model: nn.Module) -> list[tuple[PruningSpec, list[str]]]:
    """Return the specification and the layers of each group, those with held layers left out."""
    groups = zip(recipe.groups, assign_layers(recipe, model), strict=True)
    return [(group.spec(), list(weights)) for group, weights in groups if group.method != HOLD]

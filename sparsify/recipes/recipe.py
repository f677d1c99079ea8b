"""Recipes: a YAML file that says which layers are pruned how far, how and when. docs/recipes.md describes the keys.

A recipe is read, its variables are put in, and every key is checked; whatever is wrong becomes one RecipeError that
names the file, the line and the key, and the nearest valid word.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from sparsify.conversion.convert import plan_convert, sparse_layers
from sparsify.conversion.module_surgery import Model
from sparsify.conversion.transaction import Transaction
from sparsify.distributed import SINGLE, Ranks
from sparsify.errors import RecipeError
from sparsify.layers.fsdp import cut_by_rows, own_rows
from sparsify.masking.allocation import ALLOCATIONS, MEASURED_ALLOCATIONS, check_sparsity
from sparsify.masking.layer_solve import LayerSpec
from sparsify.masking.masks import Allocation, is_empty, layer_targets, make_masks, n_removed_units, warn_removed_whole
from sparsify.masking.methods.registry import (
    CALIBRATED,
    METHODS,
    SOLVERS,
    TRAINING_METHODS,
    needs_data,
    required_statistics,
    takes_seed,
)
from sparsify.masking.patterns import parse_pattern
from sparsify.masking.schedules import Schedule
from sparsify.pruning.oneshot import PruningSpec, layer_specs, prune_with_specs
from sparsify.pruning.prune import set_masks
from sparsify.pruning.recover import LR, recover
from sparsify.recipes.yaml_file import Value, YamlFile, calibrate_groups, nearest, read_yaml, substitute

_METHODS = (*METHODS, *TRAINING_METHODS, *CALIBRATED, *SOLVERS)
_ALLOCATIONS = (*ALLOCATIONS, *MEASURED_ALLOCATIONS)
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)

_SEEDS = 2**63  # a generator of torch takes one of 64 bits

#: A method of recipes only: the zeros that are there stay, and no others come.
HOLD = "hold"


class Regrow(BaseModel):
    """At each update the weakest kept weights give their places to masked ones, which start at zero."""

    model_config = _STRICT

    by: Literal["random", "gradient"] = Field(description="which masked weights grow: random (SET), gradient (RigL)")
    fraction: float = Field(0.3, gt=0, lt=1, description="of the kept weights, at first; falls to 0 on a cosine")
    steps: int = Field(1, gt=0, description="by gradient: how many steps before an update add up their gradients")


class Group(BaseModel):
    """Layers that are pruned in the same way. Sparsities are absolute fractions of zeros."""

    model_config = _STRICT

    layers: list[str] = Field(["*"], description="globs or re: patterns over layer names")
    exclude: list[str] = Field([], description="patterns of layers to leave out")
    sparsity: float | None = Field(
        None, description="the final fraction of zeros; left out with N:M or an allocation per layer"
    )
    method: str = Field("magnitude", description=f"one of: {', '.join(_METHODS)}, {HOLD} (the zeros there are stay)")
    pattern: str = Field("unstructured", description='unstructured, rows, columns, N:M ("2:4"), blocks ("4x1")')
    allocation: str | dict[str, float] = Field(
        "uniform", description=f"{', '.join(_ALLOCATIONS)}, or pattern: sparsity"
    )
    max_sparsity: float | None = Field(None, description="no layer loses more, where the allocation shares one target")
    refit: bool = Field(False, description="change the kept weights to reproduce the layer's outputs; needs data")
    correct: bool = Field(False, description="aim at the dense model's outputs, to make up for the layers before")
    schedule: Schedule = Field(Schedule(), description="when; constant: at once")
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS, description="for methods that draw random numbers")
    masked: Literal["zero", "frozen", "trained"] = Field(
        "zero", description="until the schedule ends, masked weights are zero, keep their values, or train on"
    )
    decay: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="how fast masked weights that are trained shrink (SR-STE)"
    )
    regrow: Regrow | None = Field(None, description="kept and masked weights change places at each update")
    rewind: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="after each update all weights go back to this time"
    )

    @property
    def needs_data(self) -> str:
        """What of this group needs calibration data; "" if nothing does."""
        if self.method != HOLD and needs_data(self.method):
            return f"method {self.method!r}"
        if self.refit or self.correct:
            return "'refit'" if self.refit else "'correct'"
        return f"allocation {self.allocation!r}" if self.allocation in MEASURED_ALLOCATIONS else ""

    @field_validator("schedule", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, schedule: Any) -> Any:
        """Refuse what would be read as a number without being one: a quoted number, or true."""
        for key, value in schedule.items() if isinstance(schedule, dict) else ():
            if key not in ("kind", "unit", "points") and isinstance(value, (str, bool)):
                raise ValueError(f"{key!r} must be a number, got {value!r}")
        return schedule

    @field_validator("sparsity", "max_sparsity")
    @classmethod
    def _fraction(cls, sparsity: float | None) -> float | None:
        return sparsity if sparsity is None else check_sparsity(sparsity)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in _METHODS and method != HOLD:
            raise ValueError(f"there is no method {method!r}{nearest(method, (*_METHODS, HOLD))}")
        return method

    @field_validator("pattern")
    @classmethod
    def _valid_pattern(cls, pattern: str) -> str:
        return parse_pattern(pattern).text

    @field_validator("allocation")
    @classmethod
    def _known_allocation(cls, allocation: Allocation) -> Allocation:
        if isinstance(allocation, str) and allocation not in _ALLOCATIONS:
            raise ValueError(f"there is no allocation {allocation!r}{nearest(allocation, _ALLOCATIONS)}")
        return allocation

    @model_validator(mode="after")
    def _reaches_its_target(self) -> Group:
        """Refuse what cannot end at exactly the target, whatever the model."""
        if self.method == HOLD:
            return self
        pattern = parse_pattern(self.pattern)
        allocation: Allocation = self.allocation if isinstance(self.allocation, str) else {}
        n_removed_units({}, self.sparsity, pattern, allocation, self.max_sparsity)
        draws = self.method in METHODS and takes_seed(METHODS[self.method])
        if self.seed is not None and not draws and not self.regrow:
            raise ValueError(f"'seed' has no effect with method {self.method!r}; take it out")
        if isinstance(self.allocation, dict):
            if self.sparsity is not None:
                raise ValueError("'sparsity' has no effect beside an allocation for each layer; take it out")
            finals = [check_sparsity(s, f"the sparsity of {name!r}") for name, s in self.allocation.items()]
        else:
            finals = [1 - pattern.keep / pattern.group if pattern.is_nm else check_sparsity(self.sparsity or 0.0)]
        kind, points = self.schedule.kind, self.schedule.points
        _order(self)  # refuses what would have no effect
        if self.needs_data and kind not in ("constant", "one-shot"):
            raise ValueError(
                f"{self.needs_data} needs calibration data, which is looked at once, so the schedule must be constant"
            )
        if pattern.is_nm and kind not in ("constant", "one-shot", "alternating"):
            raise ValueError(
                f"pattern {self.pattern} has one sparsity only, so the schedule must be constant, one-shot or "
                "alternating"
            )
        if kind == "steps" and (len(finals) > 1 or points[-1][1] != finals[0]):
            raise ValueError(f"the last of the schedule's points must be the target {finals}, got {points[-1][1]}")
        if self.schedule.initial > min(finals, default=1.0):
            raise ValueError(f"the schedule's initial {self.schedule.initial} lies above the target {min(finals)}")
        for final in finals:
            self.schedule.sparsity_at((self.schedule.start + self.schedule.ends) / 2, final)
        return self

    @model_validator(mode="after")
    def _keys_go_together(self) -> Group:
        """Refuse a key that another one leaves without effect."""
        times = self.schedule.update_times()
        if self.method == HOLD:
            held = {key for key in self.model_fields_set if key not in ("layers", "exclude", "method")}
            if held:
                raise ValueError(f"{min(held)!r} has no effect with method {HOLD!r}; take it out")
        several = len(times) > 1
        if self.schedule.kind == "constant" and several and not self.regrow and self.masked == "zero":
            raise ValueError(
                "a constant schedule with 'every' has no effect without 'regrow', or 'masked' weights kept"
            )
        for key, given in (("regrow", self.regrow), ("masked", self.masked != "zero")):
            if given and not several:
                raise ValueError(f"{key!r} has no effect at one update only; give the schedule an 'end' and 'every'")
        if self.regrow and (self.masked != "zero" or self.schedule.kind == "alternating" or ":" in self.pattern):
            raise ValueError("'regrow' goes with masked weights at zero, no alternating schedule, and no N:M pattern")
        if self.decay and self.masked != "trained":
            raise ValueError("'decay' has no effect unless masked weights are 'trained'")
        if self.rewind is not None and not self.rewind <= times[0]:
            raise ValueError(f"'rewind' must not lie after the first update, {times[0]:g}, got {self.rewind:g}")
        return self

    @property
    def trains(self) -> bool:
        """Whether it takes a training, rather than one moment, to follow this group."""
        one_moment = self.schedule.kind == "one-shot" or len(self.schedule.update_times()) == 1
        statistics = self.method != HOLD and required_statistics(self.method)
        return not one_moment or bool(statistics) or self.rewind is not None


class Recover(BaseModel):
    """A short distillation towards the dense model, after all groups are pruned; see `sparsify.recover`."""

    model_config = _STRICT

    steps: int | None = Field(None, gt=0, description="batches to train on")
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False, description="time to train for")
    lr: float = Field(LR, gt=0, allow_inf_nan=False, description="Adam's highest learning rate")
    seed: int = Field(0, ge=-_SEEDS, lt=_SEEDS, description="for the order of the batches")

    @model_validator(mode="after")
    def _has_a_budget(self) -> Recover:
        if self.steps is None and self.seconds is None:
            raise ValueError("recover needs a budget: 'steps', 'seconds', or both")
        return self


class Recipe(BaseModel):
    """A checked recipe. Read one with `load_recipe`, or build it in Python with the same fields."""

    model_config = _STRICT

    version: Literal[1] = 1
    description: str = ""
    vars: dict[str, Any] = Field({}, description="values for ${name} elsewhere in the file")
    groups: list[Group] = Field(min_length=1, max_length=1000)
    recover: Recover | None = Field(None, description="a short distillation after the pruning; needs data")


def load_recipe(path: str | os.PathLike[str], **variables: Value) -> Recipe:
    """Read and check a recipe file; keyword arguments override its variables.

    Raises RecipeError, naming file, line and key, and OSError if the file cannot be opened.
    """
    file = read_yaml(path)
    if not isinstance(file.content, dict):
        raise file.error((), f"a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    declared = file.content.get("vars") or {}
    if not isinstance(declared, dict):
        raise file.error(("vars",), "vars is a mapping from name to value")
    for name in variables:
        if name not in declared:
            raise file.error(
                ("vars",) if "vars" in file.content else (),
                f"there is no variable {name!r} to set{nearest(name, declared)}",
            )
    values: dict[str, Value] = {**declared, **variables}
    body: dict[str, Value] = {key: value for key, value in file.content.items() if key != "vars"}
    used = {value for value in calibrate_groups(body) if isinstance(value, str)}
    for name in declared:
        if f"${{{name}}}" not in used:
            raise file.error(
                ("vars", name), f"the variable {name!r} is used nowhere; write ${{{name}}} where it belongs"
            )
    content = substitute(file, body, values)
    assert isinstance(content, dict)
    try:
        return Recipe.model_validate({**content, "vars": values})
    except ValidationError as error:
        raise _explain(file, error) from None


def assign_layers(recipe: Recipe, model: nn.Module) -> list[dict[str, Tensor]]:
    """Return, for each group, its layers and their weights (out, in); the model is not touched.

    Raises ValueError if a pattern matches nothing, if two groups claim one layer, or if a target cannot be
    met exactly. The model may be converted or not.
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
                pattern = parse_pattern(group.pattern)
                n_removed_units(shapes, group.sparsity, pattern, group.allocation, group.max_sparsity)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for name in shapes:
            if name in owner:
                raise ValueError(f"{where}: {name!r} is already in groups.{owner[name]}; a layer belongs to one group")
            owner[name] = number
        groups.append(weights)
    return groups


def apply(
    model: Model,
    recipe: Recipe,
    *,
    data: Iterable[Any] | None = None,
    cache_bytes: int | None = None,
    progress: bool = False,
) -> Model:
    """Prune a converted model as the recipe says, now, in place, and return the model.

    data: calibration batches, as for `prune`; all groups are then pruned in one walk through the model. With a
    `recover` stage, the model as it comes, copied, is the teacher. cache_bytes, progress: as for `prune`. Raises
    ValueError if a schedule needs training (use a Pruner in the training loop), or a group data, before any mask is
    changed. Whatever fails, the model is as it was.
    """
    check_applicable(recipe, has_data=data is not None)
    if recipe.recover is not None:
        assert data is not None
        data, teacher = list(data), copy.deepcopy(model)
        plain = recipe.model_copy(update={"recover": None})
        with Transaction(model) as undo:
            undo.keep((*model.parameters(), *model.buffers()))
            apply(model, plain, data=data, cache_bytes=cache_bytes, progress=progress)
            return recover(model, teacher, data, **recipe.recover.model_dump(), progress=progress)
    if data is not None:
        prune_with_specs(model, _orders(recipe, model), data, cache_bytes=cache_bytes, progress=progress)
        return model
    if cache_bytes is not None:
        raise ValueError(f"cache_bytes={cache_bytes} has no effect without data; give data=...")
    masks: dict[str, Tensor] = {}
    for group, weights in zip(recipe.groups, assign_layers(recipe, model), strict=True):
        made = group_masks(model, group, list(weights))
        if group.method != HOLD:
            warn_removed_whole({n: is_empty(mask) for n, mask in made.items()}, group.sparsity, group.allocation)
        masks |= made
    layers = sparse_layers(model)
    set_masks(model, {layers[name]: mask for name, mask in masks.items()})
    return model


def check_applicable(recipe: Recipe, *, has_data: bool) -> None:
    """Raise ValueError if `apply` cannot follow a recipe, whatever the model: it trains, or needs data."""
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
    if recipe.recover is not None and not has_data:
        raise ValueError("recover needs calibration data: sparsify.apply(..., data=...)")


def recipe_layer_specs(recipe: Recipe, model: nn.Module) -> dict[str, LayerSpec]:
    """Say what each layer of a converted model is to become, as far as shapes decide it; the model may be on meta.

    Raises ValueError for an allocation that is measured, a group that trains, and a layer that is to be held.
    """
    tasks: dict[str, LayerSpec] = {}
    for number, group in enumerate(recipe.groups):
        if group.trains or group.method == HOLD:
            raise ValueError(
                f"groups.{number}: takes more than one look at calibration data; prune the model in memory"
            )
    layers = sparse_layers(model)
    for order, names in _orders(recipe, model):
        tasks |= layer_specs({name: layers[name].shape for name in names}, order)
    return tasks


def _orders(recipe: Recipe, model: nn.Module) -> list[tuple[PruningSpec, list[str]]]:
    groups = zip(recipe.groups, assign_layers(recipe, model), strict=True)
    return [(_order(group), list(weights)) for group, weights in groups if group.method != HOLD]


def group_masks(
    model: nn.Module,
    group: Group,
    names: list[str],
    time: float | None = None,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    ranks: Ranks = SINGLE,
) -> dict[str, Tensor]:
    """Return the masks (out, in) that a group's layers get at a time (None: at the end); nothing is changed.

    `statistics` has, for each layer, what its training showed (registry.TRAINING_STATISTICS). Several `ranks` share
    the ranking, each its rows, and get the same masks: whole weights of layers that FSDP2 has sharded are nowhere.
    """
    layers = sparse_layers(model)
    if missing := [name for name in names if name not in layers]:
        raise ValueError(f"{missing[0]}: not converted; call sparsify.convert(model) first")
    if not all(cut_by_rows(layers[name], parse_pattern(group.pattern), ranks) for name in names):
        ranks = SINGLE  # every rank ranks all of it
    weights = {name: own_rows(layers[name], ranks) for name in names}
    _check_finite(weights, ranks)
    masks = {name: ranks.rows(layers[name].matrix(layers[name].mask)) for name in names}
    shown = {n: {key: ranks.rows(value) for key, value in of.items()} for n, of in (statistics or {}).items()}
    made = _group_rows(group, weights, masks, time, shown, ranks)
    return {name: ranks.join(mask, layers[name].shape[0]) for name, mask in made.items()}


def _check_finite(rows: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Raise ValueError on all ranks if one has a weight that is not finite; alone it would leave the others waiting."""
    if ranks.n > 1:
        bad = ranks.sum(torch.tensor([int(not own.isfinite().all()) for own in rows.values()], device="cpu"))
        for name, n_bad in zip(rows, bad.tolist(), strict=True):
            if n_bad:
                raise ValueError(
                    f"{name}: the weight holds NaN or Inf on {n_bad} of {ranks.n} ranks; mend it, or leave the layer "
                    f"out with exclude=[{name!r}]"
                )


def _group_rows(
    group: Group,
    weights: dict[str, Tensor],
    masks: dict[str, Tensor],
    time: float | None,
    statistics: Mapping[str, Mapping[str, Tensor]],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Return this rank's rows of the masks."""
    names = list(weights)
    if group.method == HOLD:
        return {name: masks[name] & (weights[name] != 0) for name in names}
    method, seed = group.method, group.seed
    if group.regrow:  # it begins at random places; later masks of the same sizes keep theirs
        n_masked = ranks.sum(torch.stack([(~mask).sum() for mask in masks.values()]))
        method, seed = (method, None) if bool(n_masked.any()) else ("random", seed)
    if group.masked != "zero":  # what is masked has a value, and may come back
        masks = {name: torch.ones_like(mask) for name, mask in masks.items()}

    def target(final: float) -> float:
        return final if time is None else group.schedule.sparsity_at(time, final)

    def masks_of(chosen: list[str], sparsity: float | None, allocation: str) -> dict[str, Tensor]:
        return make_masks(
            {name: weights[name] for name in chosen},
            sparsity,
            masks={name: masks[name] for name in chosen},
            method=method,
            pattern=group.pattern,
            allocation=allocation,
            max_sparsity=group.max_sparsity,
            seed=seed,
            statistics=statistics,
            ranks=ranks,
        )

    if isinstance(group.allocation, dict):
        finals = layer_targets(group.allocation, dict.fromkeys(names))
        return {name: masks_of([name], target(finals[name]), "uniform")[name] for name in names}
    if parse_pattern(group.pattern).is_nm:
        if target(1.0) == 0:  # not yet, or a dense phase
            return {name: torch.ones_like(mask) for name, mask in masks.items()}
        return masks_of(names, None, "uniform")
    assert group.sparsity is not None
    return masks_of(names, target(group.sparsity), group.allocation)


def _order(group: Group) -> PruningSpec:
    return PruningSpec(
        group.sparsity,
        group.method,
        group.pattern,
        group.allocation,
        group.max_sparsity,
        group.refit,
        group.correct,
        group.seed,
    )


def _explain(file: YamlFile, error: ValidationError) -> RecipeError:
    """Turn pydantic's first finding into a sentence with file, line and key."""
    first = error.errors(include_url=False)[0]
    place = tuple(
        key
        for key in first["loc"]
        if key in ("groups", "schedule", "regrow", "recover") or isinstance(key, int) or _is_key(file, key)
    )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        place = first["loc"]
        message = f"unknown key {place[-1]!r}{nearest(str(place[-1]), _known_keys(place[:-1]))}"
    elif first["type"] == "missing":
        message = f"the key {first['loc'][-1]!r} is missing"
    elif first["type"] == "literal_error" and isinstance(first["input"], str):
        expected = [word.strip("' ") for word in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        message = f"{first['input']!r} is not valid here{nearest(first['input'], expected)}"
    return file.error(place, message)


def _is_key(file: YamlFile, key: str | int) -> bool:
    return any(key in place for place in file.lines)


def _known_keys(place: tuple[str | int, ...]) -> list[str]:
    if place and place[-1] == "schedule":
        return [field.name for field in fields(Schedule)]
    if place and place[-1] == "regrow":
        return list(Regrow.model_fields)
    if place and place[-1] == "recover":
        return list(Recover.model_fields)
    return list(Group.model_fields if place else Recipe.model_fields)

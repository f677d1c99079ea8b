"""The schema of a recipe: every key, and the checks of each group. docs/recipes.md describes the keys."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sparsify.masking.allocation import ALLOCATIONS, MEASURED_ALLOCATIONS, check_sparsity, depth_spread
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
from sparsify.masking.spec import Allocation, PruningSpec, check_options
from sparsify.pruning.reconstruct import LR as RECONSTRUCT_LR
from sparsify.pruning.reconstruct import Reconstruction
from sparsify.pruning.recover import LR
from sparsify.recipes.yaml_file import nearest

_METHODS = (*METHODS, *TRAINING_METHODS, *CALIBRATED, *SOLVERS)
_ALLOCATIONS = (*ALLOCATIONS, *MEASURED_ALLOCATIONS)
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)

_SEEDS = 2**63  # a generator of torch takes one of 64 bits

#: A method of recipes only: the zeros that are there stay, and no others come.
HOLD = "hold"


class Regrow(BaseModel):
    """The exchange of places at each update: the weakest kept weights give theirs to masked ones, from zero."""

    model_config = _STRICT

    by: Literal["random", "gradient"] = Field(description="which masked weights grow: random (SET), gradient (RigL)")
    fraction: float = Field(0.3, gt=0, lt=1, description="of the kept weights, at first; falls to 0 on a cosine")
    steps: int = Field(1, gt=0, description="by gradient: how many steps before an update add up their gradients")


class Group(BaseModel):
    """Layers under one target, pruned in the same way. Sparsities are absolute fractions of zeros."""

    model_config = _STRICT

    layers: list[str] = Field(["*"], description="globs or re: patterns over layer names")
    exclude: list[str] = Field([], description="patterns of layers to leave out")
    types: list[str] | None = Field(
        None, min_length=1, description="dense types to convert: Linear, Conv2d ...; the default ones if left out"
    )
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
    swap: bool = Field(False, description="kept and removed weights change places where that lowers a layer's error")
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
        """The reason for calibration data in this group, in words; "" without one."""
        if self.method != HOLD and needs_data(self.method):
            return f"method {self.method!r}"
        for key in ("refit", "correct", "swap"):
            if getattr(self, key):
                return repr(key)
        return f"allocation {self.allocation!r}" if self.allocation in MEASURED_ALLOCATIONS else ""

    @field_validator("schedule", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, schedule: Any) -> Any:
        """Refuse a quoted number and true, both of them numbers to a lenient reader."""
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
        if isinstance(allocation, str) and allocation not in _ALLOCATIONS and depth_spread(allocation) is None:
            raise ValueError(f"there is no allocation {allocation!r}{nearest(allocation, _ALLOCATIONS)}")
        return allocation

    @model_validator(mode="after")
    def _reaches_its_target(self) -> Group:
        """Refuse a group without a way to exactly its target, in any model."""
        if self.method == HOLD:
            return self
        check_options(self.spec())
        if self.seed is not None and not takes_seed(self.method) and not self.regrow:
            raise ValueError(f"'seed' has no effect with method {self.method!r}; take it out")
        kind = self.schedule.kind
        if self.needs_data and kind not in ("constant", "one-shot"):
            raise ValueError(
                f"{self.needs_data} needs calibration data, which is looked at once, so the schedule must be constant"
            )
        if parse_pattern(self.pattern).is_nm and kind not in ("constant", "one-shot", "alternating"):
            raise ValueError(
                f"pattern {self.pattern} has one sparsity only, so the schedule must be constant, one-shot or "
                "alternating"
            )
        self.schedule.check_finals(self._finals())
        return self

    @model_validator(mode="after")
    def _keys_go_together(self) -> Group:
        """Refuse a key without effect beside the others."""
        times = self.schedule.update_times()
        if self.method == HOLD:
            held = {key for key in self.model_fields_set if key not in ("layers", "exclude", "types", "method")}
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

    def spec(self, time: float | None = None) -> PruningSpec:
        """Return the specification of this group's layers at a time of its schedule (None: at the end).

        A seed for growth alone is left out.
        """

        def target(final: float) -> float:
            return final if time is None else self.schedule.sparsity_at(time, final)

        pattern, sparsity, allocation = self.pattern, self.sparsity, self.allocation
        if isinstance(allocation, dict):
            allocation = {name: target(final) for name, final in allocation.items()}
        elif parse_pattern(pattern).is_nm:
            if target(1.0) == 0.0:  # not yet, or a dense phase
                pattern, sparsity = "unstructured", 0.0
        elif sparsity is not None:
            sparsity = target(sparsity)
        return PruningSpec(
            sparsity,
            self.method,
            pattern,
            allocation,
            self.max_sparsity,
            self.refit,
            self.correct,
            self.seed if takes_seed(self.method) else None,
            self.swap,
        )

    def _finals(self) -> list[float]:
        """Return the final sparsities of this group's layers."""
        if isinstance(self.allocation, dict):
            return list(self.allocation.values())
        pattern = parse_pattern(self.pattern)
        return [1 - pattern.keep / pattern.group if pattern.is_nm else self.spec().target]

    @property
    def trains(self) -> bool:
        """True if this group is followed during a training, rather than at one moment."""
        one_moment = self.schedule.kind == "one-shot" or len(self.schedule.update_times()) == 1
        statistics = self.method != HOLD and required_statistics(self.method)
        return not one_moment or bool(statistics) or self.rewind is not None


class Reconstruct(BaseModel):
    """The tuning of each block once its layers are pruned; see `sparsify.prune`."""

    model_config = _STRICT

    epochs: int = Field(gt=0, description="how often a block sees the calibration data")
    lr: float = Field(RECONSTRUCT_LR, gt=0, allow_inf_nan=False, description="Adam's highest learning rate, relative")
    seed: int = Field(0, ge=-_SEEDS, lt=_SEEDS, description="for the order of the batches")
    bfloat16: bool = Field(False, description="compute in bfloat16, where processors have instructions for it")


class Recover(BaseModel):
    """A short distillation towards the dense model, after all groups are pruned; see `sparsify.recover`."""

    model_config = _STRICT

    steps: int | None = Field(None, gt=0, description="batches to train on")
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False, description="time to train for")
    lr: float = Field(LR, gt=0, allow_inf_nan=False, description="Adam's highest learning rate")
    seed: int = Field(0, ge=-_SEEDS, lt=_SEEDS, description="for the order of the batches")
    bfloat16: bool = Field(False, description="compute in bfloat16, where processors have instructions for it")
    move: bool = Field(False, description="let masks move, each within the pattern of its group")
    logits: bool | None = Field(None, description="compare the logits too; none: where the output has a field of it")

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
    reconstruct: Reconstruct | None = Field(None, description="tune each block once it is pruned; needs data")
    recover: Recover | None = Field(None, description="a short distillation after the pruning; needs data")
    quantize: Literal["int8", "int8-weights"] | None = Field(
        None,
        description="in the end `compress` rounds kept weights to int8, and with int8 inputs too",
    )

    @property
    def reconstruction(self) -> Reconstruction | None:
        """The options of the reconstruction; None without one."""
        return None if self.reconstruct is None else Reconstruction(**self.reconstruct.model_dump())

"""Records on a layer: the result of its pruning on data, and its form and rounding at export.

Masked and packed layers declare them as attributes. A dense layer can have them too: one that `export` keeps dense has
its form choice, and one made by `to_dense` its pruning result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

#: A sparse form must beat dense by this much: less is within the noise of the measurement.
MARGIN = 0.97


@dataclass(frozen=True)
class LayerResult:
    """The outcome for one layer: the relative change of its outputs on the calibration data, and the time spent.

    A file holds no time: a layer that was loaded has None.
    """

    error: float
    time_s: float | None


@dataclass(frozen=True)
class FormChoice:
    """A form, "dense" among them, and why: the median microseconds of every candidate for `tokens` rows of input."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # in a file, an unknown key is an error

    form: str
    tokens: int
    times_us: Mapping[str, float]
    machine: str

    @property
    def reason(self) -> str:
        """The reason for this form, in a few words.

        >>> FormChoice("panel", 64, {"dense": 300.0, "panel": 60.0}, "a machine").reason
        '5.00x dense for 64 tokens (60 of 300 us)'
        """
        if not self.times_us and self.form == "dense" and self.tokens:
            return "no sparse kernel for this kind of layer; its file is compact all the same"
        if not self.times_us:
            return "no kernel for int8 values runs here; see sparsify doctor" if self.tokens else "asked for"
        dense = self.times_us["dense"]
        others = [(t, form) for form, t in self.times_us.items() if form != "dense"]
        if self.form != "dense":
            ours = self.times_us[self.form]
            why = "" if ours < MARGIN * dense else ", taken for its memory"
            return f"{dense / ours:.2f}x dense for {self.tokens} tokens ({ours:.0f} of {dense:.0f} us){why}"
        if not others:
            return "no sparse kernel runs here; see sparsify doctor"
        time_us, form = min(others)
        return f"sparse is no faster for {self.tokens} tokens: {form} {dense / time_us:.2f}x dense"


@dataclass(frozen=True)
class Rounding:
    """The relative change of a layer's outputs by rounding to int8, and the most allowed.

    by_weights: by int8 weights alone. by_inputs: by int8 weights and inputs; None if inputs were not to be rounded.
    on_example: measured on the layer's inputs in the example, else on random rows.
    input_limit: the most allowed for inputs to be rounded, if less than `limit`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid", "ser_json_inf_nan": "strings"}

    by_weights: float
    by_inputs: float | None
    limit: float
    on_example: bool
    input_limit: float = math.inf

    @property
    def _inputs_too(self) -> bool:
        return self.by_inputs is not None and self.by_inputs <= min(self.limit, self.input_limit)

    @property
    def allowed(self) -> str:
        """The part that may be int8: "int8" (inputs too), "int8-weights" or "" for nothing.

        >>> Rounding(0.01, 0.2, 0.05, True).allowed
        'int8-weights'
        """
        if self._inputs_too:
            return "int8"
        return "int8-weights" if self.by_weights <= self.limit else ""

    @property
    def reason(self) -> str:
        """The reason for what stays as it is, in a few words; "" if all that was asked for may be int8."""
        if not self.allowed:
            return f"int8 weights would change its outputs by {self.by_weights:.2g}, over {self.limit:g}"
        if self.by_inputs is None or self._inputs_too:
            return ""
        limit = min(self.limit, self.input_limit)
        return f"int8 inputs would change its outputs by {self.by_inputs:.2g}, over {limit:g}"


@dataclass(frozen=True)
class LayerRecord:
    """The errors of a layer as a file holds them: that of its pruning on data, and those of its rounding."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid", "ser_json_inf_nan": "strings"}

    error: float | None = None
    rounding: Rounding | None = None


def record_of(module: nn.Module) -> LayerRecord | None:
    """Return the errors of a layer; None for one without any."""
    result, rounding = pruning_result(module), rounding_of(module)
    if result is None and rounding is None:
        return None
    return LayerRecord(None if result is None else result.error, rounding)


def set_record(module: nn.Module, record: LayerRecord) -> None:
    """Set the errors of a layer, as `record_of` returned them."""
    layer: Any = module
    if record.error is not None:
        layer.pruning_result = LayerResult(record.error, None)
    set_rounding(module, record.rounding)


def rounding_of(module: nn.Module) -> Rounding | None:
    """Return the record of a layer's rounding by `export`; None for any other module."""
    rounding = vars(module).get("rounding")
    return rounding if isinstance(rounding, Rounding) else None


def form_choice(module: nn.Module) -> FormChoice | None:
    """Return the form choice of a layer, packed or kept dense; None for any other module, or an attribute of a user."""
    choice = vars(module).get("choice")
    return choice if isinstance(choice, FormChoice) else None


def set_form_choice(module: nn.Module, choice: FormChoice | None) -> None:
    """Set or remove the form choice of a layer; an attribute of the same name by a user stays.

    Without a form choice there is no record of rounding either.
    """
    layer: Any = module
    if choice is not None:
        layer.choice = choice
    elif form_choice(module) is not None:
        del layer.choice
        vars(module).pop("choice_others_cores", None)
        set_rounding(module, None)


def set_disturbance(module: nn.Module, others_cores: float) -> None:
    """Record on a layer how many cores other processes kept busy while its form was measured; 0 records nothing."""
    layer: Any = module
    if others_cores:
        layer.choice_others_cores = others_cores


def disturbance_of(module: nn.Module) -> float:
    """Return the cores busy with other processes while a layer's form was measured, in this process; 0 for few."""
    return float(vars(module).get("choice_others_cores", 0.0))


def set_rounding(module: nn.Module, rounding: Rounding | None) -> None:
    """Set or remove the record of a layer's rounding."""
    layer: Any = module
    if rounding is not None:
        layer.rounding = rounding
    elif rounding_of(module) is not None:
        del layer.rounding


def pruning_result(module: nn.Module) -> LayerResult | None:
    """Return the result of a layer's pruning on data, also after export or `to_dense`; None for any other module."""
    result = vars(module).get("pruning_result")
    return result if isinstance(result, LayerResult) else None

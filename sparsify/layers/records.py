"""Records on a layer: the result of its pruning on data, and the form chosen for it at export.

Masked and packed layers declare them as attributes. A dense layer can have them too: one that `export` keeps dense has
its form choice, and one made by `to_dense` its pruning result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

#: A sparse form must beat dense by this much: less is within the noise of the measurement.
MARGIN = 0.97


@dataclass(frozen=True)
class LayerResult:
    """The outcome for one layer: the relative change of its outputs on the calibration data, and the time spent."""

    error: float
    time_s: float


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
        if not self.times_us:
            return "asked for"
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


def form_choice(module: nn.Module) -> FormChoice | None:
    """Return the form choice of a layer, packed or kept dense; None for any other module, or an attribute of a user."""
    choice = vars(module).get("choice")
    return choice if isinstance(choice, FormChoice) else None


def set_form_choice(module: nn.Module, choice: FormChoice | None) -> None:
    """Set or remove the form choice of a layer; an attribute of the same name by a user stays."""
    layer: Any = module
    if choice is not None:
        layer.choice = choice
    elif form_choice(module) is not None:
        del layer.choice


def pruning_result(module: nn.Module) -> LayerResult | None:
    """Return the result of a layer's pruning on data, also after export or `to_dense`; None for any other module."""
    result = vars(module).get("pruning_result")
    return result if isinstance(result, LayerResult) else None

"""An entry of the zoo: one architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsify.reporting.model_run import Inputs


@dataclass(frozen=True)
class Model:
    """One architecture, in two sizes, with its inputs and the arguments of sparsify.convert.

    - small: builds a few narrow layers of the same structure with random weights, to be run.
    - inputs: the inputs of the small model; train_inputs: its inputs in training, if they differ.
    - full: builds the usual size, to be called on the meta device, for the converted share of the parameters.
    - full_inputs: its inputs, for the converted share of the work; None if the work depends on the data.
    - fresh: builds a model to load a file onto, if small() has its own weights.
    - quick: False if the checks take a minute: those are for scripts/zoo.py.
    - convert: the arguments of sparsify.convert.
    - continuous: False if an output jumps with the last bit of a weight, as the boxes of a detector do.
    - bypasses_its_layers: True if the model's own code reads the weight of a Linear without a call of it: only a
      Pruner then keeps masked weights at zero.
    """

    small: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    full: Callable[[], nn.Module]
    full_inputs: Callable[[], Inputs] | None
    train_inputs: Callable[[], Inputs] | None = None
    fresh: Callable[[], nn.Module] | None = None
    quick: bool = True
    convert: Mapping[str, Any] = field(default_factory=dict)
    continuous: bool = True
    bypasses_its_layers: bool = False

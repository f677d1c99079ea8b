"""What the zoo knows of one architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsify.reporting.model_bench import Inputs


@dataclass(frozen=True)
class Model:
    """One architecture, in two sizes.

    small() builds a few narrow layers of the same structure with random weights, to be run; inputs() is what it takes,
    and train_inputs() what it takes in training where that is something else. full() builds the usual size, to be
    called on the meta device: it says how much of the model is converted, and on full_inputs() (None where the work
    depends on the data) how much of its work. fresh() builds what a file is loaded onto, where small() has its
    own weights. `convert` holds the arguments that sparsify.convert needs here.
    continuous is False where an output jumps with the last bit of a weight: which boxes survive, for one. reads_weights
    is True where the model's own code reads the weight of a Linear that it does not call: only a Pruner then keeps
    masked weights at zero. quick is False where the checks take a minute: those are for scripts/zoo.py.
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

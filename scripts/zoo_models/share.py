"""The swapped layers' share of a model's parameters and work, at the usual size, without data."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import sparsify
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.layers import MaskedLayer
from sparsify.reporting.model_run import run
from zoo_models.model import Model


@dataclass(frozen=True)
class Share:
    """The layers swapped, and their fractions; `of_work` is None if it depends on the data."""

    n_parameters: int
    n_layers: int
    of_parameters: float
    of_work: float | None

    def __str__(self) -> str:
        work = "it depends" if self.of_work is None else f"{self.of_work:.0%}"
        return f"{self.n_layers} | {self.of_parameters:.0%} | {work}"


def share(model: Model, **arguments: Any) -> Share:
    """Convert the full size on the meta device, without memory, with these arguments, and count."""
    with torch.device("meta"):
        full = model.full().eval()
        inputs = model.full_inputs() if model.full_inputs else None
    work: Mapping[object, int] = {}
    if inputs is not None:
        with _Work() as counter, torch.no_grad():
            run(full, inputs)
        work = counter.of_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparsify.LeftDenseWarning)
        warnings.simplefilter("ignore", sparsify.DefaultTypesWarning)
        sparsify.convert(full, **arguments)
    weights = [layer.weight for layer in layers_of_type(full, MaskedLayer).values()]
    n_parameters = sum(parameter.numel() for parameter in full.parameters())
    return Share(
        n_parameters=n_parameters,
        n_layers=len(weights),
        of_parameters=sum(weight.numel() for weight in weights) / n_parameters,
        of_work=sum(work.get(_memory(weight), 0) for weight in weights) / work[None] if work else None,
    )


class _Work(TorchDispatchMode):
    """Adds up multiply-adds by the memory of each tensor in them (a view shares its weight's), and all (None)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of_memory: dict[object, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        count: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if count is not None:
            n = count(*args, **(kwargs or {}), out_val=output)
            memories = {_memory(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
            for memory in (*memories, None):
                self.of_memory[memory] += n
        return output


def _memory(tensor: Tensor) -> object:
    return tensor.untyped_storage()._cdata

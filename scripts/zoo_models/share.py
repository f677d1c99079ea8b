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
from sparsify.layers import MaskedLayer, SparseConv2d
from sparsify.layers.torch_layer import TorchLayer
from sparsify.reporting.model_run import run
from zoo_models.model import Model


@dataclass(frozen=True)
class Share:
    """The layers swapped, and their fractions; those of work are None if it depends on the data.

    before: of the layers among them that were the only ones once, Linears and 1x1 convolutions.
    """

    n_parameters: int
    n_layers: int
    of_parameters: float
    of_work: float | None
    of_parameters_before: float
    of_work_before: float | None

    def __str__(self) -> str:
        parameters = f"{self.of_parameters_before:.0%} | {self.of_parameters:.0%}"
        if self.of_work is None or self.of_work_before is None:
            return f"{self.n_layers} | {parameters} | it depends | it depends"
        return f"{self.n_layers} | {parameters} | {self.of_work_before:.0%} | {self.of_work:.0%}"


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
    layers = layers_of_type(full, MaskedLayer).values()
    weights = [layer.weight for layer in layers]
    before = [layer.weight for layer in layers if _was_known(layer)]
    n_parameters = sum(parameter.numel() for parameter in full.parameters())
    return Share(
        n_parameters=n_parameters,
        n_layers=len(weights),
        of_parameters=sum(weight.numel() for weight in weights) / n_parameters,
        of_work=_of_work(work, weights),
        of_parameters_before=sum(weight.numel() for weight in before) / n_parameters,
        of_work_before=_of_work(work, before),
    )


def _of_work(work: Mapping[object, int], weights: Sequence[Tensor]) -> float | None:
    return sum(work.get(_memory(weight), 0) for weight in weights) / work[None] if work else None


def _was_known(layer: MaskedLayer) -> bool:
    """Return whether a layer is a product of a matrix with rows: a Linear in any guise, or a 1x1 convolution."""
    if isinstance(layer, SparseConv2d):
        return layer.groups == 1 and layer.kernel_size == (1, 1)
    return not isinstance(layer, TorchLayer)


def _grouped_products(tokens: Tensor, matrices: Tensor, *_: object, **__: object) -> int:
    """Count the multiply-adds, twice, of tokens (n, k) that each meet one of the matrices (groups, k, columns)."""
    return 2 * tokens.numel() * matrices.shape[-1]


#: What torch counts, and what it leaves out: the products of experts.
_COUNTS: Mapping[object, Callable[..., int]] = {**flop_registry, torch.ops.aten._grouped_mm: _grouped_products}


class _Work(TorchDispatchMode):
    """Adds up multiply-adds by the memory of each tensor in them (a view shares its weight's), and all (None)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of_memory: dict[object, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func._overloadpacket)
        if count is not None:
            n = count(*args, **(kwargs or {}), out_val=output)
            memories = {_memory(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
            for memory in (*memories, None):
                self.of_memory[memory] += n
        return output


def _memory(tensor: Tensor) -> object:
    return tensor.untyped_storage()._cdata

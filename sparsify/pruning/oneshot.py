"""Prune a trained model on calibration data: walk through its layers, and give each its task."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from tqdm import tqdm

from sparsify.calibration.activation_store import MemoryBudget, SpillingTensorList
from sparsify.calibration.batches import Batch, read_batches
from sparsify.calibration.sequential import CalibratedGroup, calibrate_groups
from sparsify.conversion.convert import sparse_layers
from sparsify.conversion.transaction import Transaction
from sparsify.layers import MaskedLayer
from sparsify.masking.allocation import capped
from sparsify.masking.layer_solve import LayerSpec, output_error, prune_layer, weight_for_dense_outputs
from sparsify.masking.masks import Allocation, check_target, n_removed_units, warn_removed_whole
from sparsify.masking.methods.registry import SOLVERS, Method
from sparsify.masking.patterns import parse_pattern
from sparsify.pruning.measured_allocation import MEASURED, show_layers


@dataclass(frozen=True)
class LayerResult:
    """How a layer came out: the relative change of its outputs on the calibration data, and the time it took."""

    error: float
    time_s: float


@dataclass(frozen=True)
class PruningSpec:
    """What layers are to become together, in the words of `prune`."""

    sparsity: float | None
    method: str | Method = "magnitude"
    pattern: str = "unstructured"
    allocation: Allocation = "uniform"
    max_sparsity: float | None = None
    refit: bool = False
    correct: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse an option that would have no effect."""
        if self.correct and not self.refit and self.method not in SOLVERS:
            raise ValueError(
                f"correct=True has no effect with method {self.method!r} unless refit=True changes weights"
            )


def layer_specs(shapes: Mapping[str, tuple[int, int]], order: PruningSpec) -> dict[str, LayerSpec]:
    """Say for layers of these shapes (out, in) what each is to become.

    Raises ValueError if that takes a look at the data first, as allocations "global", "owl" and "error" do: see
    `prune_with_specs`.
    """
    pattern = parse_pattern(order.pattern)
    n_removed = n_removed_units(shapes, order.sparsity, pattern, order.allocation, order.max_sparsity)
    if n_removed is None:
        raise ValueError(f"allocation {order.allocation!r} is measured on the model and its data, not on shapes")
    return _tasks(order, shapes, n_removed)


def prune_with_specs(
    model: nn.Module,
    orders: Sequence[tuple[PruningSpec, Sequence[str]]],
    data: Iterable[Any],
    *,
    cache_bytes: int | None = None,
    progress: bool = False,
) -> None:
    """Follow orders, each for the layers named beside it, in one walk through the model; see `prune_sequentially`."""
    layers = sparse_layers(model)
    chosen = [(order, {name: layers[name] for name in names}) for order, names in orders]
    shares = [_n_removed(order, mine) for order, mine in chosen]  # what cannot be done is said before the data is read
    batches = read_batches(model, data)
    tasks: dict[str, LayerSpec] = {}
    for (order, mine), n_removed in zip(chosen, shares, strict=True):
        if n_removed is None:
            n_removed = _measure(model, mine, order, batches, cache_bytes)
        tasks |= _tasks(order, {name: layer.shape for name, layer in mine.items()}, n_removed)
    prune_sequentially(model, tasks, batches, cache_bytes=cache_bytes, progress=progress)


class LayerStore(Protocol):
    """Where finished layers go, and, where the model's weights are on disk, unfinished ones come from."""

    def fetch(self, module: nn.Module) -> None:
        """Make sure that a layer's weight is in memory."""

    def write(self, name: str, layer: MaskedLayer) -> None:
        """Keep a layer that is finished."""


def prune_sequentially(
    model: nn.Module,
    tasks: Mapping[str, LayerSpec],
    data: Iterable[Any],
    *,
    keeper: LayerStore | None = None,
    cache_bytes: int | None = None,
    progress: bool = False,
) -> None:
    """Give every layer its task, in place and in execution order, so that each sees what those before it have become.

    Each layer then has its `LayerResult` as an attribute `fit`. An error leaves all layers as they were; with a
    `keeper`, those that are finished are kept there instead, and so they stay. cache_bytes: how much of the data on its
    way through the model stays in memory; the rest, and what the layers were, goes to a file (None: all of it stays).
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if name in tasks}
    choosing = [name for name, layer in layers.items() if tasks[name].chooses(layer.shape)]
    correct = any(task.correct for task in tasks.values())
    with contextlib.ExitStack() as stack:
        undo = None
        if keeper is None:  # where the data on its way spills, what the layers were goes to disk as well
            copies = (
                None if cache_bytes is None else stack.enter_context(SpillingTensorList(len(layers), MemoryBudget(0)))
            )
            undo = stack.enter_context(Transaction(model, copies=copies))
        stops = calibrate_groups(model, layers, data, dense=correct, cache_bytes=cache_bytes, choosing=choosing)
        stack.callback(stops.close)
        bar = stack.enter_context(tqdm(total=len(layers), desc="calibrate", unit="layer", disable=not progress))
        for stop in stops:
            gram = stop.gram.matrix
            for name in stop.names:
                if keeper is not None:
                    keeper.fetch(layers[name])
                if undo is not None:
                    undo.keep([layers[name].weight])
                fit = _prune(name, layers[name], tasks[name], stop, gram)
                if keeper is not None:
                    keeper.write(name, layers[name])
                bar.set_postfix_str(f"{name}, error {fit.error:.3f}")
                bar.update(1)


def _prune(name: str, layer: MaskedLayer, task: LayerSpec, stop: CalibratedGroup, gram: Tensor) -> LayerResult:
    """Give one layer its task; `gram` is the whole matrix of the stop."""
    started = time.perf_counter()
    matrix = layer.matrix(layer.weight.detach())
    present = layer.matrix(layer.mask)
    used = matrix.masked_fill(~present, 0)
    wanted = weight_for_dense_outputs(used, stop.gram) if task.correct else used
    weight, mask = prune_layer(name, wanted, present, task, gram)
    error = output_error(wanted, weight, gram)
    matrix.copy_(weight)
    layer.set_mask(mask, back_at_zero=False)  # a solver may have given a value to what comes back
    fit = layer.__dict__["fit"] = LayerResult(error, time.perf_counter() - started)
    return fit


def _tasks(
    order: PruningSpec, shapes: Mapping[str, tuple[int, int]], n_removed: Mapping[str, int]
) -> dict[str, LayerSpec]:
    pattern = parse_pattern(order.pattern)
    whole = {name: 0 < pattern.n_units(shapes[name]) == n for name, n in n_removed.items()}
    warn_removed_whole(whole, order.sparsity, order.allocation)
    return {
        name: LayerSpec(order.method, pattern, n, order.refit, order.correct, order.seed)
        for name, n in n_removed.items()
    }


def _n_removed(order: PruningSpec, layers: Mapping[str, MaskedLayer]) -> dict[str, int] | None:
    """Return what each layer loses as far as shapes say it."""
    shapes = {name: layer.shape for name, layer in layers.items()}
    return n_removed_units(shapes, order.sparsity, parse_pattern(order.pattern), order.allocation, order.max_sparsity)


def _measure(
    model: nn.Module,
    layers: Mapping[str, MaskedLayer],
    order: PruningSpec,
    batches: list[Batch],
    cache_bytes: int | None,
) -> dict[str, int]:
    """Look at the data to say what each layer loses."""
    assert isinstance(order.allocation, str)
    pattern, target = parse_pattern(order.pattern), check_target(order.sparsity)
    sample = LayerSpec(order.method, pattern, 0, order.refit, order.correct, order.seed)
    show = functools.partial(show_layers, model, layers, batches, cache_bytes)
    allocate = MEASURED[order.allocation](layers, target, sample, show)
    n_units = {name: pattern.n_units(layer.shape) for name, layer in layers.items()}
    return capped(allocate, n_units, target, order.max_sparsity)

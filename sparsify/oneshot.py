"""Prune a trained model on calibration data: walk through its layers, and give each its task."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsify.calibrate import walk
from sparsify.convert import sparse_layers
from sparsify.layers import Masked
from sparsify.masks import Allocation, n_removed_units
from sparsify.methods import Method
from sparsify.patterns import parse_pattern
from sparsify.solve import Task, output_error, solve


@dataclass(frozen=True)
class Fit:
    """How a layer came out: the relative change of its outputs on the calibration data, and the time it took."""

    error: float
    time_s: float


def make_tasks(
    shapes: Mapping[str, tuple[int, int]],
    sparsity: float | None,
    *,
    method: str | Method,
    pattern: str = "unstructured",
    allocation: Allocation = "uniform",
    seed: int | None = None,
) -> dict[str, Task]:
    """Say for layers of these shapes (out, in) what each is to become; see `prune` for the arguments."""
    parsed = parse_pattern(pattern)
    n_removed = n_removed_units(shapes, sparsity, parsed, allocation)
    if n_removed is None:
        raise ValueError("allocation 'global' ranks the layers before the first is pruned; leave the data out")
    return {name: Task(method, parsed, n, seed) for name, n in n_removed.items()}


class Keeper(Protocol):
    """Where finished layers go, and, where the model's weights are on disk, unfinished ones come from."""

    def fetch(self, module: nn.Module) -> None:
        """Make sure that a layer's weight is in memory."""

    def write(self, name: str, layer: Masked) -> None:
        """Keep a layer that is finished."""


def prune_on_data(
    model: nn.Module,
    tasks: Mapping[str, Task],
    data: Iterable[Any],
    *,
    keeper: Keeper | None = None,
    cache_bytes: int | None = None,
    progress: bool = False,
) -> None:
    """Give every layer its task, in place and in execution order, so that each sees what those before it have become.

    Each layer then has its `Fit` as an attribute `fit`. An error leaves all layers as they were; with a `keeper`, those
    that are finished are kept there instead, and so they stay. cache_bytes: how much of the data on its way through the
    model stays in memory, the rest goes to files (None: all of it).
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if name in tasks}
    before: dict[str, tuple[Tensor, Tensor]] = {}
    stops = walk(model, layers, data, cache_bytes=cache_bytes)
    try:
        with tqdm(total=len(layers), desc="calibrate", unit="layer", disable=not progress) as bar:
            for stop in stops:
                gram = stop.gram.matrix
                for name in stop.names:
                    started = time.perf_counter()
                    layer = layers[name]
                    if keeper is not None:
                        keeper.fetch(layer)
                    matrix = layer.matrix(layer.weight.detach())
                    weight, mask = solve(name, matrix, layer.matrix(layer.mask), tasks[name], gram)
                    error = output_error(matrix, weight, gram)
                    if keeper is None:
                        before[name] = layer.weight.detach().clone(), layer.mask
                    matrix.copy_(weight)
                    layer.set_mask(mask)
                    layer.__dict__["fit"] = Fit(error, time.perf_counter() - started)
                    if keeper is not None:
                        keeper.write(name, layer)
                    bar.set_postfix_str(f"{name}, error {error:.3f}")
                    bar.update(1)
    except BaseException:
        for name, (weight, mask) in before.items():
            with torch.no_grad():
                layers[name].weight.copy_(weight)
            layers[name].mask = mask
            layers[name].__dict__.pop("fit", None)
        raise
    finally:
        stops.close()

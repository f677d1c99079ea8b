"""Sequential pruning of a trained model on calibration data: layer by layer, each by its specification."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from tqdm import tqdm

from sparsify.calibration.activation_store import MemoryBudget, SpillingTensorList
from sparsify.calibration.batches import read_batches
from sparsify.calibration.sequential import CalibratedGroup, calibrate_groups
from sparsify.conversion.convert import sparse_layers
from sparsify.conversion.transaction import Transaction
from sparsify.layers import MaskedLayer
from sparsify.layers.records import LayerResult
from sparsify.masking.layer_solve import output_error, prune_layer, weight_for_dense_outputs
from sparsify.masking.masks import warn_removed_whole
from sparsify.masking.methods.registry import needs_products
from sparsify.masking.spec import LayerSpec, PruningSpec, check_spec, layer_specs
from sparsify.pruning.measured_allocation import MEASURED, calibrated_layers


def prune_with_specs(
    model: nn.Module,
    specs: Sequence[tuple[PruningSpec, Sequence[str]]],
    data: Iterable[Any],
    *,
    cache_bytes: int | None = None,
    progress: bool = False,
) -> None:
    """Prune layers by specifications, each for the layers named beside it, in one pass; see `prune_sequentially`."""
    layers = sparse_layers(model)
    shapes = [{name: layers[name].shape for name in names} for _, names in specs]
    for (spec, _), shapes_of_spec in zip(specs, shapes, strict=True):
        check_spec(spec, shapes_of_spec)  # before the data is read
    batches = read_batches(model, data)
    of_layers: dict[str, LayerSpec] = {}
    for (spec, names), shapes_of_spec in zip(specs, shapes, strict=True):
        allocate = None
        if spec.is_measured:
            assert isinstance(spec.allocation, str)
            of_spec = {name: layers[name] for name in names}
            by_sizes = spec.allocation == "owl" or (spec.allocation == "global" and not needs_products(spec.method))
            calibrated = calibrated_layers(model, of_spec, batches, cache_bytes, sampled=by_sizes)
            allocate = MEASURED[spec.allocation](calibrated, spec)
        chosen = layer_specs(spec, shapes_of_spec, allocate)
        warn_removed_whole({name: layer.empties(shapes_of_spec[name]) for name, layer in chosen.items()}, spec)
        of_layers |= chosen
    prune_sequentially(model, of_layers, batches, cache_bytes=cache_bytes, progress=progress)


class LayerStore(Protocol):
    """The place for finished layers; also the source of unfinished ones, if the model's weights are on disk."""

    def fetch(self, module: nn.Module) -> None:
        """Read a layer's weight into memory, unless it is there."""

    def write(self, name: str, layer: MaskedLayer) -> None:
        """Keep a finished layer."""


def prune_sequentially(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    data: Iterable[Any],
    *,
    keeper: LayerStore | None = None,
    cache_bytes: int | None = None,
    progress: bool = False,
) -> None:
    """Prune each layer by its specification, in place and in execution order, on the inputs from pruned layers before.

    Each layer then has its `LayerResult` as an attribute `pruning_result`. An error leaves all layers as they were;
    with a `keeper`, finished layers are kept there instead, and stay pruned.

    cache_bytes: of the intermediates and of the layers' former state in memory; the rest goes to a file (None: all of
    it stays in memory)
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if name in specs}
    choosing = [name for name, layer in layers.items() if specs[name].chooses(layer.shape)]
    sampled = [name for name in layers if not specs[name].needs_products]
    correct = any(spec.correct for spec in specs.values())
    with contextlib.ExitStack() as stack:
        undo = None
        if keeper is None:  # if intermediates spill, the former state of the layers goes to disk as well
            copies = (
                None if cache_bytes is None else stack.enter_context(SpillingTensorList(len(layers), MemoryBudget(0)))
            )
            undo = stack.enter_context(Transaction(model, copies=copies))
        groups = calibrate_groups(
            model, layers, data, dense=correct, cache_bytes=cache_bytes, choosing=choosing, sampled=sampled
        )
        stack.callback(groups.close)
        bar = stack.enter_context(tqdm(total=len(layers), desc="calibrate", unit="layer", disable=not progress or None))
        for group in groups:
            gram = group.gram.matrix
            for name in group.names:
                if keeper is not None:
                    keeper.fetch(layers[name])
                if undo is not None:
                    undo.keep([layers[name].weight])
                result = _prune(name, layers[name], specs[name], group, gram)
                if keeper is not None:
                    keeper.write(name, layers[name])
                bar.set_postfix_str(f"{name}, error {result.error:.3f}")
                bar.update(1)


def _prune(name: str, layer: MaskedLayer, spec: LayerSpec, group: CalibratedGroup, gram: Tensor) -> LayerResult:
    """Prune one layer of a group; `gram` is the whole matrix of the group."""
    started = time.perf_counter()
    matrix = layer.matrix(layer.weight.detach())
    present = layer.matrix(layer.mask)
    used = matrix.masked_fill(~present, 0)
    wanted = weight_for_dense_outputs(used, group.gram) if spec.correct else used
    weight, mask = prune_layer(name, wanted, present, spec, gram)
    error = output_error(wanted, weight, gram)
    layer.weight.detach().copy_(layer.as_weight(weight))
    layer.set_mask(mask, back_at_zero=False)  # a solver may have given a value to weights that come back
    result = layer.pruning_result = LayerResult(error, time.perf_counter() - started)
    return result

"""Sequential pruning of a trained model on calibration data: layer by layer, each by its specification."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn
from tqdm import tqdm

from sparsify.calibration.activation_store import MemoryBudget, SpillingTensorList
from sparsify.calibration.batches import read_batches
from sparsify.calibration.sequential import CalibratedGroup, calibrate_groups
from sparsify.calibration.tunable_block import TunableBlock
from sparsify.conversion.convert import sparse_layers
from sparsify.conversion.transaction import Transaction
from sparsify.layers import MaskedLayer
from sparsify.layers.records import LayerResult
from sparsify.masking.layer_solve import output_error, prune_layer, weight_for_dense_outputs
from sparsify.masking.masks import warn_removed_whole
from sparsify.masking.methods.registry import needs_products
from sparsify.masking.spec import LayerSpec, PruningSpec, check_spec, layer_specs, merged
from sparsify.pruning.measured_allocation import MEASURED, calibrated_layers, matrix_names
from sparsify.pruning.reconstruct import Reconstruction, tune_block


def prune_with_specs(
    model: nn.Module,
    specs: Sequence[tuple[PruningSpec, Sequence[str]]],
    data: Iterable[Any],
    *,
    cache_bytes: int | None = None,
    reconstruct: Reconstruction | None = None,
    progress: bool = False,
) -> None:
    """Prune layers by specifications, each for the layers named beside it, in one pass; see `prune_sequentially`."""
    layers = sparse_layers(model)
    shapes = [{name: layers[name].shape for name in names} for _, names in specs]
    for (spec, _), shapes_of_spec in zip(specs, shapes, strict=True):
        check_spec(spec, shapes_of_spec)  # before the data is read
    if reconstruct is not None and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("the model was made inside torch.inference_mode() and cannot be trained; make it outside")
    batches = read_batches(model, data)
    of_layers: dict[str, LayerSpec] = {}
    for (spec, names), shapes_of_spec in zip(specs, shapes, strict=True):
        allocate, parts = None, {}
        if spec.is_measured:
            parts = {name: own for name in names if (own := matrix_names(name, layers[name]))}
            assert isinstance(spec.allocation, str)
            of_spec = {name: layers[name] for name in names}
            by_sizes = spec.allocation == "owl" or (spec.allocation == "global" and not needs_products(spec.method))
            calibrated = calibrated_layers(model, of_spec, batches, cache_bytes, sampled=by_sizes)
            allocate = MEASURED[spec.allocation](calibrated, spec)
        shapes_of_parts = {
            part: (shape[0] // len(parts.get(name, (name,))), shape[1])
            for name, shape in shapes_of_spec.items()
            for part in parts.get(name, (name,))
        }
        chosen = merged(layer_specs(spec, shapes_of_parts, allocate), parts)
        warn_removed_whole({name: layer.empties(shapes_of_spec[name]) for name, layer in chosen.items()}, spec)
        of_layers |= chosen
    prune_sequentially(model, of_layers, batches, cache_bytes=cache_bytes, reconstruct=reconstruct, progress=progress)


class LayerStore(Protocol):
    """The place for finished layers; also the source of unfinished ones, if the model's weights are on disk."""

    @property
    def finished(self) -> Collection[str]:
        """The names of the layers finished by an earlier run."""

    def take_over(self, name: str, layer: MaskedLayer) -> None:
        """Give a layer the weight and mask that it was finished with."""

    def fetch(self, module: nn.Module) -> None:
        """Read a layer's weight into memory, unless it is there."""

    def write(self, layers: Mapping[str, MaskedLayer]) -> None:
        """Keep finished layers: all of them, or none if the process dies."""


def prune_sequentially(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    data: Iterable[Any],
    *,
    keeper: LayerStore | None = None,
    cache_bytes: int | None = None,
    reconstruct: Reconstruction | None = None,
    progress: bool = False,
) -> None:
    """Prune each layer by its specification, in place and in execution order, on the inputs from pruned layers before.

    Each layer then has its `LayerResult` as an attribute `pruning_result`. An error leaves all layers as they were;
    with a `keeper`, finished layers are kept there instead, and stay pruned; those finished before are taken over.

    cache_bytes: of the intermediates and of the layers' former state in memory; the rest goes to a file (None: all of
    it stays in memory)
    reconstruct: tune each block of a chain once its layers are pruned
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if name in specs}
    finished = {} if keeper is None else {name: layers.pop(name) for name in keeper.finished if name in layers}
    resumed = bool(finished)
    correct = any(spec.correct for spec in specs.values())
    with contextlib.ExitStack() as stack:
        undo = None
        if keeper is None:  # if intermediates spill, the former state of the layers goes to disk as well
            copies = None
            if cache_bytes is not None:
                n_tensors = sum(len(_own(layer)) for layer in layers.values())
                copies = stack.enter_context(SpillingTensorList(n_tensors, MemoryBudget(0)))
            undo = stack.enter_context(Transaction(model, copies=copies))
        bar = stack.enter_context(tqdm(total=len(layers), desc="calibrate", unit="layer", disable=not progress or None))
        run = _SequentialPruning(layers, specs, finished, keeper, reconstruct, undo, bar)
        if not layers or not (correct or reconstruct):
            run.take_over()
        if not layers:
            return
        groups = calibrate_groups(
            model,
            layers,
            data,
            dense=correct,
            cache_bytes=cache_bytes,
            choosing=[name for name, layer in layers.items() if specs[name].chooses(layer.shape)],
            sampled=[name for name in layers if not specs[name].needs_products],
            tune=None if reconstruct is None else run.tune,
            ready=run.take_over,
            resumed=resumed,
        )
        stack.callback(groups.close)
        for group in groups:
            run.prune(group)


@dataclass(frozen=True)
class _SequentialPruning:
    """One pass of pruning: the layers to do, those finished before, and the changes to each as its time comes."""

    layers: Mapping[str, MaskedLayer]
    specs: Mapping[str, LayerSpec]
    finished: dict[str, MaskedLayer]
    keeper: LayerStore | None
    reconstruct: Reconstruction | None
    undo: Transaction | None
    bar: Any

    def take_over(self, ready: Callable[[str], bool] = lambda name: True) -> None:
        """Give finished layers, of names that pass the test, their finished weights."""
        for name in [name for name in self.finished if ready(name)]:
            assert self.keeper is not None
            self.keeper.take_over(name, self.finished.pop(name))

    def prune(self, group: CalibratedGroup) -> None:
        """Prune the layers of a group; those of a block to be tuned are kept later."""
        gram = group.gram.matrix
        for name in group.names:
            layer = self.layers[name]
            if self.keeper is not None:
                self.keeper.fetch(layer)
            if self.undo is not None:
                self.undo.keep(_own(layer) if self.reconstruct is not None else [layer.weight])
            result = _prune(name, layer, self.specs[name], group, gram)
            if self.keeper is not None and (self.reconstruct is None or group.block is None):
                self.keeper.write({name: layer})
            self.bar.set_postfix_str(f"{name}, error {result.error:.3f}")
            self.bar.update(1)

    def tune(self, block: TunableBlock) -> None:
        """Tune a block with all of its layers pruned, and keep them."""
        assert self.reconstruct is not None
        started, layers = time.perf_counter(), {name: self.layers[name] for name in block.layers}

        def tell(step: int, n_steps: int, loss: float) -> None:
            self.bar.set_postfix_str(f"{block.name}, reconstruct {step} of {n_steps}, loss {loss:.4f}")

        tune_block(block, layers, self.reconstruct, tell)
        seconds = (time.perf_counter() - started) / len(layers)
        for layer in layers.values():
            assert layer.pruning_result is not None
            layer.pruning_result = replace(layer.pruning_result, time_s=(layer.pruning_result.time_s or 0.0) + seconds)
        if self.keeper is not None:
            self.keeper.write(layers)


def _own(layer: MaskedLayer) -> list[Tensor]:
    """Return the weight and the bias of a layer."""
    return list(layer.parameters(recurse=False))


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

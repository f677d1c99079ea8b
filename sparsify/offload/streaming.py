"""Pruning from disk to disk: weights are read block by block, and written back, for models larger than memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.checkpoint import container
from sparsify.checkpoint.container import LayerEntry
from sparsify.checkpoint.weight_codec import decode_weight, encode_weight, packed_bytes
from sparsify.conversion.convert import sparse_layers
from sparsify.conversion.converters.table import packed_type
from sparsify.inference.export import check_format, form_asked_for
from sparsify.inference.form_selection import FormSelector
from sparsify.inference.rounding import MAX_ERROR, RoundingJudge, warn_left_float
from sparsify.kernels import FORMS
from sparsify.kernels.csr import dense_to_csr
from sparsify.kernels.int8 import quantize as round_weight
from sparsify.layer_names import join
from sparsify.layers import CSRLinear
from sparsify.layers.records import FormChoice, LayerRecord, Rounding
from sparsify.masking.spec import LayerSpec
from sparsify.offload.disk_offload import DiskOffload, largest_block_bytes, parameter_bytes
from sparsify.offload.journal import Journal
from sparsify.offload.lazy_safetensors import LazySafetensors
from sparsify.pruning.oneshot import prune_sequentially
from sparsify.pruning.reconstruct import Reconstruction
from sparsify.reporting.file_report import entry_row, with_rounding
from sparsify.reporting.report import Report, Row

#: Default for the bytes of activations in memory.
CACHE_BYTES = 10**9


def prune_from_disk(
    model: nn.Module,
    weights: LazySafetensors,
    specs: Mapping[str, LayerSpec],
    data: Iterable[Any],
    journal: Journal,
    *,
    cache_bytes: int = CACHE_BYTES,
    reconstruct: Reconstruction | None = None,
    progress: bool = False,
) -> None:
    """Prune a model on the meta device, layer by layer into the journal; `write_from_disk` writes the result.

    model: built `parameters_on_meta` and converted.
    specs: for every masked layer (`oneshot.layer_specs`).

    In memory are one block of layers, the solver's tensors for its largest layer, and `cache_bytes` of activations;
    with `reconstruct` also three times the block, for gradients and Adam.
    Layers already in the journal are not pruned again, and the result is the same bit for bit.
    """
    if missing := [name for name in sparse_layers(model) if name not in specs]:
        raise ValueError(f"{missing[0]}: there is no task for this layer; convert only what is to be pruned")
    offload = DiskOffload(model, weights, journal, largest_block_bytes(model), dense=True)
    options: dict[str, Any] = {"cache_bytes": cache_bytes, "reconstruct": reconstruct, "progress": progress}
    try:
        prune_sequentially(model, specs, data, keeper=offload, **options)
    finally:
        offload.close()


def write_from_disk(
    model: nn.Module,
    weights: LazySafetensors,
    journal: Journal,
    out: str | os.PathLike[str],
    *,
    format: str = "auto",
    tokens: int | None = None,
    quantize: str | None = None,
    example: Any = None,
) -> Report:
    """Write the exported layers of a journal, and everything else of the model, to `out`.

    format, tokens, quantize, example: as for `export`; the example tells what may be int8. The model itself is of no
    use afterwards; `sparsify.load` reads the file.
    """
    check_format(format, tokens, torch.device("cpu"), quantize)
    offload = DiskOffload(model, weights, journal, largest_block_bytes(model))
    try:
        layers = sparse_layers(model)
        n_bytes = sum(layer.weight.nbytes for layer in layers.values())
        selector = FormSelector(128 if tokens is None else tokens, model_bytes=n_bytes)
        judge = None if quantize is None else RoundingJudge(model, quantize, MAX_ERROR, example, by_inputs=False)
        choices, roundings = {}, {}
        for name, layer in layers.items():
            offload.fetch(layer)
            packs = packed_type(layer) is not None
            rounding = judge.judge(layer, selector.tokens) if judge and packs else None
            if rounding is not None:
                roundings[name] = rounding
            allowed = rounding.allowed if rounding else ""
            given = judge.inputs.get(layer) if judge else None
            auto = format == "auto" or (not packs and format != "dense")
            choices[name] = selector.choose(layer, given, allowed) if auto else form_asked_for(layer, format, allowed)
    finally:
        offload.close()
    warn_left_float(roundings)
    return _write(model, weights, journal, choices, roundings, out)


def least_bytes(
    model: nn.Module,
    weights: LazySafetensors | None,
    specs: Mapping[str, LayerSpec],
    journal: Path,
    *,
    quantized: bool = False,
) -> int:
    """Return a lower bound of the bytes still to write: the layers not yet in the journal, and the file.

    weights: the source of the Parameters, of a model built `parameters_on_meta`.
    journal: its folder, with or without files.
    quantized: the file may hold int8 weights.
    """
    sizes = parameter_bytes(model, weights)
    layers = sparse_layers(model)
    packed = in_file = 0
    for name, spec in specs.items():
        shape, n_weights = layers[name].shape, layers[name].weight.numel()
        rows, columns = (1, 1) if spec.pattern.is_nm else spec.pattern.unit_shape(shape)
        itemsize = sizes.pop(id(layers[name].weight)) // max(n_weights, 1)
        n_kept = n_weights - spec.n_removed * rows * columns
        packed += packed_bytes(shape, n_kept, itemsize)
        in_file += packed_bytes(shape, n_kept, 1 if quantized else itemsize)
    finished = sum(file.stat().st_size for file in journal.iterdir()) if journal.is_dir() else 0
    return max(packed - finished, 0) + in_file + sum(sizes.values())


@contextlib.contextmanager
def offloaded(model: nn.Module, weights: LazySafetensors, journal: Journal | None = None) -> Iterator[nn.Module]:
    """Let a model built `parameters_on_meta` run: as it is in the file, or with the journal's finished layers.

    Each weight is there while its own module runs; anything else reads NaN.
    """
    offload = DiskOffload(model, weights, journal, largest_block_bytes(model))
    try:
        yield model
    finally:
        offload.close()


def prune_resumably(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    data: Iterable[Any],
    journal: Journal,
    *,
    cache_bytes: int = CACHE_BYTES,
    reconstruct: Reconstruction | None = None,
    progress: bool = False,
) -> None:
    """Prune a model in memory, in place, and write each finished layer to the journal; take over those there."""
    options: dict[str, Any] = {"cache_bytes": cache_bytes, "reconstruct": reconstruct, "progress": progress}
    prune_sequentially(model, specs, data, keeper=journal, **options)


def _write(
    model: nn.Module,
    weights: LazySafetensors,
    journal: Journal,
    choices: Mapping[str, FormChoice],
    roundings: Mapping[str, Rounding],
    out: str | os.PathLike[str],
) -> Report:
    """Put the journal's layers and the file's other tensors together, one at a time."""
    rounded = {name for name, rounding in roundings.items() if rounding.allowed and choices[name].form != "dense"}
    finished, layers = _FinishedLayers(journal, rounded), sparse_layers(model)
    readers: dict[str, Callable[[], Tensor]] = {}
    entries: dict[str, LayerEntry] = {}
    rows: list[Row] = []
    records: dict[str, LayerRecord] = {}
    for name, layer in layers.items():
        entry, tensors = finished.read(name)
        choice, result = choices[name], journal.pruning_result(name)
        exported_type = "CSRLinear" if choice.form in FORMS else "Linear"
        if (exported_type, entry.format) != ("Linear", "dense"):
            entries[name] = entry.model_copy(update={"module": exported_type})
        n_kept = int(decode_weight(entry, tensors)[1].sum())
        n_bytes = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith("weight"))
        row = entry_row(name, entry, n_kept, layer.weight.dtype, n_bytes)
        row = replace(row, reason=choice.reason, times_us=dict(choice.times_us))
        if name in roundings:
            row = with_rounding(row, roundings[name], choice.form, rounded=name in rounded)
        if result is not None:
            row = replace(row, error=result.error, time_s=result.time_s)
        if result is not None or name in roundings:
            records[name] = LayerRecord(row.error, roundings.get(name))
        rows.append(row)
        readers |= {join(name, key): partial(finished.tensor, name, key) for key in tensors}
    aliases: dict[str, str] = {}
    packed = {id(tensor) for layer in layers.values() for tensor in (layer.weight, layer.mask)}
    for (first, *others), value in _names_of_state(model):
        if id(value) not in packed:
            aliases |= dict.fromkeys(others, first)
            in_file = next((name for name in (first, *others) if name in weights), None)
            readers.setdefault(first, partial(_same, value) if in_file is None else partial(weights.read, in_file))
    container.write(out, entries, aliases, dict(choices), _ReadOnLookup(readers), records)
    return Report(tuple(rows))


def _names_of_state(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Return the tensors of a model's state, each with all of its names."""
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, value in state.items():
        names.setdefault(id(value), []).append(name)
    return [(of_one, state[of_one[0]]) for of_one in names.values()]


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _FinishedLayers:
    """Packed layers of a journal, some rounded to int8; the last one read stays in memory."""

    def __init__(self, journal: Journal, rounded: Collection[str] = ()) -> None:
        self.journal, self.rounded = journal, rounded
        self._last: tuple[str, tuple[LayerEntry, dict[str, Tensor]]] | None = None

    def read(self, name: str) -> tuple[LayerEntry, dict[str, Tensor]]:
        if self._last is None or self._last[0] != name:
            self._last = None
            read = self.journal.read(name)
            self._last = name, _rounded(*read) if name in self.rounded else read
        return self._last[1]

    def tensor(self, name: str, key: str) -> Tensor:
        return self.read(name)[1][key]


def _rounded(entry: LayerEntry, tensors: dict[str, Tensor]) -> tuple[LayerEntry, dict[str, Tensor]]:
    """Round the weight of a packed layer to int8; all else stays."""
    weight, mask = decode_weight(entry, tensors)
    csr, scale = round_weight(dense_to_csr(weight, mask), entry.out_features)
    layer = CSRLinear(entry.in_features, entry.out_features, csr, scale=scale, dtype=weight.dtype)
    int8_entry, parts = encode_weight(layer)
    others = {key: tensor for key, tensor in tensors.items() if key.partition(".")[0] != "weight"}
    return int8_entry, others | {join("weight", key): tensor for key, tensor in parts.items()}


class _ReadOnLookup(Mapping[str, Tensor]):
    """Tensors by name, read at each lookup."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)

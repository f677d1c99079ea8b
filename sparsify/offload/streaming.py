"""Prune a model that need not fit in memory: its weights are read from disk block by block, and written back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.checkpoint import container
from sparsify.checkpoint.container import LayerEntry
from sparsify.checkpoint.weight_codec import decode_weight, packed_bytes
from sparsify.conversion.convert import sparse_layers
from sparsify.inference.export import check_format
from sparsify.inference.form_selection import FormChoice, FormSelector, why_chosen
from sparsify.kernels import FORMS
from sparsify.masking.spec import LayerSpec
from sparsify.offload.disk_offload import DiskOffload, LazySafetensors, largest_block_bytes, parameter_bytes
from sparsify.offload.journal import Journal
from sparsify.pruning.oneshot import prune_sequentially
from sparsify.reporting.report import Report, Row

#: How much of the data on its way through the model stays in memory, unless the caller says otherwise.
CACHE_BYTES = 10**9


def prune_from_disk(
    model: nn.Module,
    weights: LazySafetensors,
    tasks: Mapping[str, LayerSpec],
    data: Iterable[Any],
    journal: Journal,
    *,
    cache_bytes: int = CACHE_BYTES,
    progress: bool = False,
) -> None:
    """Prune a model that was built `parameters_on_meta`, layer by layer into the journal; `write_from_disk` ends it.

    model: converted; see `resident.without_memory`. tasks: for every masked layer (`oneshot.make_tasks`). In memory are
    one block of layers, what its largest layer needs to be solved, and `cache_bytes` of activations. Layers that are in
    the journal already are not pruned again, and the result is the same bit for bit.
    """
    if missing := [name for name in sparse_layers(model) if name not in tasks]:
        raise ValueError(f"{missing[0]}: there is no task for this layer; convert only what is to be pruned")
    todo = {name: task for name, task in tasks.items() if name not in journal}
    resident = DiskOffload(model, weights, journal, largest_block_bytes(model))
    try:
        if todo:
            prune_sequentially(model, todo, data, keeper=resident, cache_bytes=cache_bytes, progress=progress)
    finally:
        resident.close()


def write_from_disk(
    model: nn.Module,
    weights: LazySafetensors,
    journal: Journal,
    out: str | os.PathLike[str],
    *,
    format: str = "auto",
    tokens: int | None = None,
) -> Report:
    """Write the exported layers of a journal, and everything else of the model, to `out`.

    format and tokens as in `export`. The model itself is of no use afterwards; `sparsify.load` reads the file.
    """
    check_format(format, tokens, torch.device("cpu"))
    resident = DiskOffload(model, weights, journal, largest_block_bytes(model))
    try:
        chooser = FormSelector(128 if tokens is None else tokens)
        choices = {}
        for name, layer in sparse_layers(model).items():
            resident.fetch(layer)
            choices[name] = chooser.choose(layer) if format == "auto" else FormChoice(format, 0, {}, "")
    finally:
        resident.close()
    return _write(model, weights, journal, choices, out)


def least_bytes(
    model: nn.Module, weights: LazySafetensors | None, tasks: Mapping[str, LayerSpec], journal: Path
) -> int:
    """Return the least that the rest of a run writes: the layers that its journal does not hold yet, and the file.

    weights: where the Parameters come from, of a model that was built `parameters_on_meta`. journal: its folder,
    which need not exist.
    """
    sizes = parameter_bytes(model, weights)
    layers = sparse_layers(model)
    packed = 0
    for name, task in tasks.items():
        shape, n_weights = layers[name].shape, layers[name].weight.numel()
        rows, columns = (1, 1) if task.pattern.is_nm else task.pattern.unit_shape(shape)
        itemsize = sizes.pop(id(layers[name].weight)) // max(n_weights, 1)
        packed += packed_bytes(shape, n_weights - task.n_removed * rows * columns, itemsize)
    finished = sum(file.stat().st_size for file in journal.iterdir()) if journal.is_dir() else 0
    return max(packed - finished, 0) + packed + sum(sizes.values())


@contextlib.contextmanager
def offloaded(model: nn.Module, weights: LazySafetensors, journal: Journal | None = None) -> Iterator[nn.Module]:
    """Let a model that was built `parameters_on_meta` run: as it is in the file, or with the journal's finished layers.

    Each weight is there while its own module runs; whatever else reads it finds NaN.
    """
    resident = DiskOffload(model, weights, journal, largest_block_bytes(model))
    try:
        yield model
    finally:
        resident.close()


def prune_resumably(
    model: nn.Module,
    tasks: Mapping[str, LayerSpec],
    data: Iterable[Any],
    journal: Journal,
    *,
    cache_bytes: int = CACHE_BYTES,
    progress: bool = False,
) -> None:
    """Prune a model in memory, in place, and keep each finished layer in the journal; layers there are taken over."""
    for name, layer in sparse_layers(model).items():
        if name in tasks and name in journal:
            journal.restore(name, layer)
    todo = {name: task for name, task in tasks.items() if name not in journal}
    if todo:
        prune_sequentially(model, todo, data, keeper=journal, cache_bytes=cache_bytes, progress=progress)


def _write(
    model: nn.Module,
    weights: LazySafetensors,
    journal: Journal,
    choices: Mapping[str, FormChoice],
    out: str | os.PathLike[str],
) -> Report:
    """Put the journal's layers and the file's other tensors together, one at a time."""
    parts = _Parts(journal)
    tensors: dict[str, Callable[[], Tensor]] = {}
    entries: dict[str, LayerEntry] = {}
    rows = []
    for name, layer in sparse_layers(model).items():
        entry, packed = parts.of(name)
        form = choices[name].form
        becomes = "CSRLinear" if form in FORMS else "Linear"
        if (becomes, entry.format) != ("Linear", "dense"):
            entries[name] = entry.model_copy(update={"module": becomes})
        own = {key: tensor for key, tensor in packed.items() if key.startswith("weight")}
        n_kept = int(decode_weight(entry, packed)[1].sum())
        n_weights, itemsize = entry.out_features * entry.in_features, layer.weight.element_size()
        fit = journal.fit(name)
        rows.append(
            Row(
                name,
                entry.shape,
                1 - n_kept / max(n_weights, 1),
                entry.format,
                sum(tensor.nbytes for tensor in own.values()),
                n_weights * itemsize,
                why_chosen(choices[name], layer.weight),
                dict(choices[name].times_us),
                *((fit.error, fit.time_s) if fit else ()),
            )
        )
        for key in packed:
            tensors[f"{name}.{key}".lstrip(".")] = partial(parts.tensor, name, key)
    packed_ids = {id(layer.weight) for layer in sparse_layers(model).values()}
    packed_ids |= {id(layer.mask) for layer in sparse_layers(model).values()}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in packed_ids:
            continue
        if first.setdefault(id(value), name) != name:
            aliases[name] = first[id(value)]
        elif name not in tensors:
            tensors[name] = partial(_other, weights, model, name, value)
    container.write(out, entries, aliases, dict(choices), _Lazy(tensors))
    return Report(tuple(rows))


def _other(weights: LazySafetensors, model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Read a tensor that no layer's entry stands for: under any of its names in the file, or a buffer of the model."""
    names = [other for other, tensor in model.state_dict(keep_vars=True).items() if tensor is value]
    found = next((other for other in names if other in weights), None)
    return value if found is None else weights.read(found)


class _Parts:
    """Packed layers of a journal, of which the last one read is kept."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._last: tuple[str, tuple[LayerEntry, dict[str, Tensor]]] | None = None

    def of(self, name: str) -> tuple[LayerEntry, dict[str, Tensor]]:
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self.journal.read(name)
        return self._last[1]

    def tensor(self, name: str, key: str) -> Tensor:
        return self.of(name)[1][key]


class _Lazy(Mapping[str, Tensor]):
    """Tensors that are read when they are looked up."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)

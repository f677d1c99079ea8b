"""Report of the layers in a checkpoint."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from sparsify.checkpoint import container
from sparsify.checkpoint.container import LayerEntry
from sparsify.checkpoint.shared_tensors import check_aliases, entries_with_tensors
from sparsify.checkpoint.weight_codec import check_weight, other_tensors, part_names
from sparsify.errors import CheckpointError
from sparsify.kernels import quantizes_inputs
from sparsify.layer_names import join
from sparsify.layers.records import FormChoice, LayerRecord, Rounding
from sparsify.reporting.report import Report, Row


def inspect_file(path: str | os.PathLike[str]) -> Report:
    """List the layers in a file, without a model; bytes are those in the file.

    Everything is checked as in `load`. Raises CheckpointError.
    """
    header, tensors = container.read(path)
    layers = entries_with_tensors(header)
    try:
        check_aliases(header, other_tensors(layers, tensors))
        weights = {join(name, "weight"): check_weight(name, entry, tensors) for name, entry in layers.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    rows = []
    for name, entry in header.layers.items():
        key = join(name, "weight")
        n_kept, dtype = weights[header.aliases.get(key, key)]
        n_bytes = sum(tensors[part].nbytes for part in part_names(name, entry)) if name in layers else 0
        row = entry_row(name, entry, n_kept, dtype, n_bytes)
        rows.append(_with_errors(row, header.records.get(name), header.choices.get(name)))
    return Report(tuple(rows))


def _with_errors(row: Row, record: LayerRecord | None, choice: FormChoice | None) -> Row:
    """Return the row of a layer with the errors in its file."""
    if record is None:
        return row
    row = replace(row, error=record.error)
    if record.rounding is None:
        return row
    return with_rounding(row, record.rounding, choice.form if choice else "", rounded="int8" in row.numbers)


def with_rounding(row: Row, rounding: Rounding, form: str, *, rounded: bool) -> Row:
    """Return the row of a layer with its change by rounding, and why a part of it stays as it is."""
    error = rounding.by_inputs if rounded and quantizes_inputs(form) else rounding.by_weights
    why = "; ".join(filter(None, (row.reason, rounding.reason)))
    return replace(row, int8_error=error if rounded or not rounding.allowed else None, reason=why)


def entry_row(name: str, entry: LayerEntry, n_kept: int, dtype: torch.dtype, n_bytes: int) -> Row:
    """Return the row of a layer in a file, with `n_kept` weights of a dtype, or int8 instead, in `n_bytes` bytes."""
    n_weights = entry.out_features * entry.in_features
    sparsity = 1 - n_kept / n_weights if n_weights else 0.0
    numbers = "int8 weights" if entry.dequantized else str(dtype).removeprefix("torch.")
    return Row(name, entry.shape, sparsity, entry.format, n_bytes, n_weights * dtype.itemsize, numbers=numbers)

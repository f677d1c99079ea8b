"""The facts about a file for its page: layers with their times, where the bytes are, and masks as pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.checkpoint import container
from sparsify.checkpoint.container import Header
from sparsify.checkpoint.shared_tensors import entries_with_tensors
from sparsify.checkpoint.weight_codec import decode_weights, part_names
from sparsify.reporting.file_report import inspect_file
from sparsify.reporting.report import Report, Row

#: A mask is drawn with so many cells a side at most, and so many masks at most: those of the largest layers.
CELLS, MOST_PICTURES = 48, 120


@dataclass(frozen=True)
class FileFacts:
    """The contents of a checkpoint, without a model.

    rows: the layers; times and reasons are those of the choice of forms, where it was measured.
    forms: the form of each layer in memory, "" if none was chosen.
    bytes_by_part: bytes of the layers' weights, of other tensors by module, and of the header.
    masks: the fraction of kept weights in each cell of a grid over the weight.
    """

    path: str
    n_bytes: int
    rows: Report
    forms: Mapping[str, str]
    machine: str
    bytes_by_part: Mapping[str, int]
    masks: Mapping[str, Tensor]


def file_facts(path: str | os.PathLike[str], measured: Report | None = None) -> FileFacts:
    """Read the facts about a file. Everything is checked as in `load`; raises CheckpointError.

    measured: the report of the same layers after the pruning, whose times and reasons the file does not hold.
    """
    listed = inspect_file(path)
    header, tensors = container.read(path)
    known: dict[str, Row] = {row.name: row for row in measured or ()}
    rows = []
    for row in listed:
        choice = header.choices.get(row.name)
        if choice is not None:
            reasons = filter(None, (choice.reason, row.reason))
            row = replace(row, reason="; ".join(reasons), times_us=dict(choice.times_us))
        if (seen := known.get(row.name)) is not None:
            row = replace(row, time_s=seen.time_s, reason=seen.reason or row.reason)
        rows.append(row)
    machines = {choice.machine for choice in header.choices.values() if choice.machine}
    return FileFacts(
        path=os.fspath(path),
        n_bytes=os.path.getsize(path),
        rows=Report(tuple(rows)),
        forms={name: choice.form for name, choice in header.choices.items()},
        machine="; ".join(sorted(machines)),
        bytes_by_part=_bytes_by_part(header, tensors, os.path.getsize(path)),
        masks=_masks(header, tensors),
    )


def density_grid(crow: Tensor, col: Tensor, shape: tuple[int, int], cells: int = CELLS) -> Tensor:
    """Return the fraction of kept weights in each cell of a grid over a weight, at most `cells` a side.

    >>> density_grid(torch.tensor([0, 2, 2]), torch.tensor([0, 1]), (2, 2))
    tensor([[1., 1.],
            [0., 0.]])
    """
    height, width = min(cells, shape[0]), min(cells, shape[1])
    row = torch.repeat_interleave(torch.arange(shape[0]), crow.diff().long())
    kept = torch.bincount((row * height // shape[0]) * width + col.long() * width // shape[1], minlength=height * width)
    rows = torch.bincount(torch.arange(shape[0]) * height // shape[0], minlength=height)
    columns = torch.bincount(torch.arange(shape[1]) * width // shape[1], minlength=width)
    return kept.reshape(height, width) / (rows[:, None] * columns)


def _bytes_by_part(header: Header, tensors: Mapping[str, Tensor], n_bytes: int) -> dict[str, int]:
    """Return the bytes of layers, of the other tensors by the module around them, and of the header."""
    layers = entries_with_tensors(header)
    own = {key for name, entry in layers.items() for key in part_names(name, entry)}
    found: Counter[str] = Counter({"weights of the layers below": sum(tensors[key].nbytes for key in own)})
    for key, tensor in tensors.items():
        if key not in own:
            found[key.rpartition(".")[0] or key] += tensor.nbytes
    found["header"] = n_bytes - found.total()
    return dict(found.most_common())


def _masks(header: Header, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    entries = entries_with_tensors(header)
    largest = sorted(entries, key=lambda name: -entries[name].out_features * entries[name].in_features)
    grids = {}
    for name in sorted(largest[:MOST_PICTURES], key=list(entries).index):
        parts = {key: tensors[key] for key in part_names(name, entries[name])}
        csr = decode_weights({name: entries[name]}, parts)[name].csr
        if csr.crow.numel() > 1 and min(entries[name].shape) > 0:
            grids[name] = density_grid(csr.crow, csr.col, entries[name].shape)
    return grids

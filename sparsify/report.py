"""What each layer of a model holds: sparsity, format, bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsify.convert import layers_of_type
from sparsify.layers import CSRLinear, SparseLinear


@dataclass(frozen=True)
class Row:
    """One layer. Bytes are those of its weight alone, `dense_bytes` what a dense weight of its dtype takes."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    format: str
    n_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Report(Sequence[Row]):
    """The rows of all layers; `str()` of it is a table for people."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.rows[index]

    @property
    def total(self) -> Row:
        """All layers together; its shape counts the weights, (1, n)."""
        n_weights = [row.shape[0] * row.shape[1] for row in self.rows]
        zeros = sum(row.sparsity * n for row, n in zip(self.rows, n_weights, strict=True))
        return Row(
            name="total",
            shape=(1, sum(n_weights)),
            sparsity=zeros / max(sum(n_weights), 1),
            format="",
            n_bytes=sum(row.n_bytes for row in self.rows),
            dense_bytes=sum(row.dense_bytes for row in self.rows),
        )

    def __str__(self) -> str:
        lines = [("layer", "shape", "sparsity", "format", "bytes", "of dense")]
        for row in (*self.rows, self.total):
            shape = f"{row.shape[0]}x{row.shape[1]}" if row.format else f"{row.shape[1]:,} weights"
            share = f"{row.n_bytes / row.dense_bytes:.3f}" if row.dense_bytes else "-"
            lines.append((row.name or "(root)", shape, f"{row.sparsity:.4f}", row.format, f"{row.n_bytes:,}", share))
        return table(lines)


def report(model: nn.Module) -> Report:
    """List every SparseLinear, CSRLinear and nn.Linear of a model, with what its weight takes in memory.

    >>> model = sparsify.convert(nn.Sequential(nn.Linear(8, 4)))
    >>> row = report(sparsify.export(sparsify.prune(model, 0.75)))[0]
    >>> row.format, row.n_bytes, row.dense_bytes
    ('csr', 60, 128)
    """
    rows = []
    for name, layer in layers_of_type(model, nn.Module).items():
        if isinstance(layer, CSRLinear):
            shape, format_ = (layer.out_features, layer.in_features), "csr"
            itemsize, n_bytes = layer.values.element_size(), _n_bytes(*layer.csr)
        elif isinstance(layer, nn.Linear):
            shape, format_ = (layer.out_features, layer.in_features), "dense"
            itemsize, n_bytes = layer.weight.element_size(), _n_bytes(layer.weight)
            if isinstance(layer, SparseLinear):
                format_, n_bytes = "masked", n_bytes + _n_bytes(layer.mask)
        else:
            continue
        sparsity = 0.0 if format_ == "dense" else float(layer.sparsity)  # type: ignore[arg-type]
        rows.append(Row(name, shape, sparsity, format_, n_bytes, shape[0] * shape[1] * itemsize))
    return Report(tuple(rows))


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lay out rows of text in columns, the first left-aligned, the others right-aligned, with a rule under the head.

    >>> print(table([("a", "n"), ("long", "1")]))
    a     n
    -------
    long  1
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def _n_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

"""Promised figures beside measured ones: ratios of medians, geometric means over cells."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.layers import BEYOND_CACHE, CACHED, OURS
from benchmarks.peers import ENGINES

Row = dict[str, Any]

#: Opponents of a layer: the fastest of these in each cell. The first needs at least one engine.
OPPONENTS: dict[str, tuple[str, ...]] = {
    "best dense fp32": (*ENGINES, "torch fp32"),
    "torch fp32": ("torch fp32",),
    "torch bf16": ("torch bf16",),
    "torch int8": ("torch int8",),
    "torch csr": ("torch csr",),
    "torch csr matmul": ("torch csr matmul",),
}


@dataclass(frozen=True)
class Bar:
    """A claim about layers: ours is `needs[sparsity]` times as fast as the opponent, or only a comparison if empty."""

    group: str
    tokens: tuple[int, int]  # from, to, both included
    against: str
    needs: dict[float, float] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The cells in words."""
        first, last = self.tokens
        tokens = f"{first} token" if first == last == 1 else f"{first} to {last} tokens"
        return tokens + (", weights larger than the last-level cache" if self.group == BEYOND_CACHE else "")


MANY, FEW, ONE = (16, 512), (1, 8), (1, 1)
LAYER_BARS = (
    Bar(CACHED, MANY, "best dense fp32", {0.5: 1.2, 0.7: 1.8, 0.8: 2.4, 0.9: 3.8, 0.95: 5.5}),
    Bar(CACHED, MANY, "torch fp32", {0.5: 2.5, 0.7: 4, 0.8: 5.5, 0.9: 9, 0.95: 13}),
    Bar(CACHED, FEW, "best dense fp32", {0.5: 1.2, 0.7: 1.5, 0.8: 1.7, 0.9: 2, 0.95: 2.8}),
    Bar(BEYOND_CACHE, ONE, "best dense fp32", {0.5: 1.5, 0.7: 2.2, 0.8: 2.8, 0.9: 4, 0.95: 7}),
    Bar(CACHED, MANY, "torch csr", dict.fromkeys((0.5, 0.7, 0.8, 0.9, 0.95), 10)),
    *(Bar(CACHED, MANY, against) for against in ("torch csr matmul", "torch bf16", "torch int8")),
    *(Bar(CACHED, FEW, against) for against in ("torch fp32", "torch csr matmul", "torch bf16", "torch int8")),
    *(Bar(BEYOND_CACHE, ONE, against) for against in ("torch fp32", "torch csr matmul", "torch bf16", "torch int8")),
)
#: sparsity -> share of the multiply-add peak, at 128 and 512 tokens
KERNEL_BARS = {0.5: 0.65, 0.7: 0.55, 0.8: 0.50, 0.9: 0.42, 0.95: 0.35}
#: (model, sparsity) -> times torch fp32, at every batch size
MODEL_BARS = {
    ("vit_b_16", 0.9): 3.5,
    ("swin_t", 0.9): 2.3,
    ("convnext_tiny", 0.9): 2.5,
    ("minilm", 0.9): 3.0,
    ("minilm", 0.5): 1.6,
}
#: 99th percentile beside a busy process, over the median without it, at most
LOAD_BAR = 4.0


@dataclass(frozen=True)
class Ratio:
    """The factor by which ours is faster than its opponent in one cell."""

    shape: tuple[int, int]
    tokens: int
    times: float

    def __str__(self) -> str:
        return f"{self.times:.2f}x at {self.shape[0]}x{self.shape[1]}, {self.tokens} tokens"


def ratios(rows: Iterable[Row], bar: Bar, sparsity: float) -> list[Ratio]:
    """Compare ours with a bar's opponent, cell by cell; empty if one of them was not measured."""
    ours: dict[tuple[Any, ...], float] = {}
    theirs: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["group"] == bar.group and bar.tokens[0] <= row["tokens"] <= bar.tokens[1]:
            cell = (*row["shape"], row["tokens"])
            if row["candidate"] == OURS and row["sparsity"] == sparsity:
                ours[cell] = row["median_us"]
            elif row["candidate"] in OPPONENTS[bar.against] and row["sparsity"] in (None, sparsity):
                theirs.setdefault(cell, {})[row["candidate"]] = row["median_us"]
    if bar.against == "best dense fp32":
        theirs = {cell: times for cell, times in theirs.items() if any(engine in times for engine in ENGINES)}
    return [
        Ratio((cell[0], cell[1]), cell[2], min(theirs[cell].values()) / time)
        for cell, time in ours.items()
        if cell in theirs
    ]


def geometric_mean(values: Sequence[float]) -> float:
    """Average ratios geometrically: 2x and 0.5x make 1x."""
    return math.exp(sum(map(math.log, values)) / len(values))


def best_by(rows: Iterable[Row], *keys: str, largest: str) -> Iterator[Row]:
    """Yield, of the rows with equal `keys`, the one with the largest value of the key `largest`."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(str(row[k]) for k in keys)
        if key not in best or row[largest] > best[key][largest]:
            best[key] = row
    yield from best.values()


def against_bar(value: float, bar: float | None, *, at_most: bool = False) -> str:
    """Write a value beside its bar: "1.31x (1.2)", with a star if it falls short.

    >>> against_bar(1.314, 1.2), against_bar(1.1, 1.2), against_bar(3.0, None)
    ('1.31x (1.2)', '1.10x (1.2) *', '3.00x')
    """
    if bar is None:
        return f"{value:.2f}x"
    missed = value > bar if at_most else value < bar
    return f"{value:.2f}x ({bar:g})" + (" *" if missed else "")

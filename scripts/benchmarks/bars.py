"""Promised figures beside measured ones: ratios of medians, geometric means over cells."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.layers import BEYOND_CACHE, BF16, CACHED, INT8, INT8_BLOCKS, OURS
from benchmarks.peers import ENGINES, INT8_ENGINES

Row = dict[str, Any]

#: Opponents of a layer: the fastest of these in each cell.
OPPONENTS: dict[str, tuple[str, ...]] = {
    "best dense fp32": (*ENGINES, "torch fp32"),
    "best dense int8": (*INT8_ENGINES, "torch int8", "torchao int8"),
    "torch fp32": ("torch fp32",),
    "torch bf16": ("torch bf16",),
    "torch int8": ("torch int8",),
    "torch csr": ("torch csr",),
    "torch csr matmul": ("torch csr matmul",),
    OURS: (OURS,),
}
#: An opponent named best is one only where at least one of these was measured.
NEEDED = {"best dense fp32": ENGINES, "best dense int8": INT8_ENGINES}


@dataclass(frozen=True)
class Bar:
    """A claim about layers: ours is `needs[sparsity]` times as fast as the opponent, or only a comparison if empty."""

    group: str
    tokens: tuple[int, int]  # from, to, both included
    against: str
    needs: dict[float, float] = field(default_factory=dict)
    ours: str = OURS

    @property
    def where(self) -> str:
        """The cells in words."""
        first, last = self.tokens
        tokens = f"{first} token" if first == last == 1 else f"{first} to {last} tokens"
        return tokens + (", weights larger than the last-level cache" if self.group == BEYOND_CACHE else "")


def _steps(*needs: float) -> dict[float, float]:
    """Assign factors to the sparsities of the grid, rising."""
    return dict(zip((0.5, 0.7, 0.8, 0.9, 0.95), needs, strict=False))


MANY, FEW, ONE = (16, 512), (1, 8), (1, 1)
_AVX512_FLOAT = (
    Bar(CACHED, MANY, "best dense fp32", _steps(1.2, 1.8, 2.4, 3.8, 5.5)),
    Bar(CACHED, MANY, "torch fp32", _steps(2.5, 4, 5.5, 9, 13)),
    Bar(CACHED, FEW, "best dense fp32", _steps(1.2, 1.5, 1.7, 2, 2.8)),
    Bar(BEYOND_CACHE, ONE, "best dense fp32", _steps(1.5, 2.2, 2.8, 4, 7)),
)
_AVX512_SMALL = (
    Bar(CACHED, MANY, "best dense int8", _steps(1.0, 1.3, 1.6, 2.3, 3.2), INT8),
    Bar(BEYOND_CACHE, ONE, "best dense int8", _steps(1.5, 2.2, 2.9, 4.2, 5), INT8),
    Bar(CACHED, FEW, "best dense int8", _steps(1.0, 1.1, 1.3, 1.8, 2.4), INT8),
    Bar(CACHED, MANY, "best dense int8", {0.5: 1.9, 0.75: 3.5, 0.9: 6}, INT8_BLOCKS),
    Bar(CACHED, MANY, "torch bf16", _steps(1.15, 1.6, 2.1, 3.4), BF16),
)
_AVX2_FLOAT = (
    Bar(CACHED, MANY, "best dense fp32", _steps(1.3, 1.9, 2.6, 4.2, 6)),
    Bar(CACHED, MANY, "torch fp32"),
    Bar(CACHED, FEW, "best dense fp32", _steps(0.75, 1.0, 1.4, 2.0, 2.8)),
    Bar(BEYOND_CACHE, ONE, "best dense fp32", _steps(1.5, 2.2, 2.8, 4, 7)),
)
_AVX2_SMALL = (
    Bar(CACHED, MANY, "best dense int8", _steps(0.7, 1.0, 1.4, 2.2, 3.0), INT8),
    Bar(CACHED, MANY, OURS, _steps(1, 1, 1, 1, 1), INT8),
    Bar(CACHED, FEW, OURS, _steps(1, 1, 1, 1, 1), INT8),
    Bar(BEYOND_CACHE, ONE, OURS, _steps(1.4, 1.4, 1.4, 1.4, 1.4), INT8),
    Bar(CACHED, MANY, OURS, _steps(1, 1, 1, 1, 1), BF16),
)
_COMPARISONS = (
    Bar(CACHED, MANY, "torch csr", _steps(10, 10, 10, 10, 10)),
    *(Bar(CACHED, MANY, against) for against in ("torch csr matmul", "torch bf16", "torch int8")),
    *(Bar(CACHED, FEW, against) for against in ("torch fp32", "torch csr matmul", "torch bf16", "torch int8")),
    *(Bar(BEYOND_CACHE, ONE, against) for against in ("torch fp32", "torch csr matmul", "torch bf16", "torch int8")),
)
_SMALL_COMPARISONS = (
    *(Bar(CACHED, tokens, "best dense int8", {}, ours) for ours in (INT8, INT8_BLOCKS) for tokens in (MANY, FEW)),
    Bar(BEYOND_CACHE, ONE, "best dense int8", {}, INT8),
    *(Bar(CACHED, tokens, "torch bf16", {}, BF16) for tokens in (MANY, FEW)),
    Bar(BEYOND_CACHE, ONE, "torch bf16", {}, BF16),
    *(Bar(CACHED, tokens, OURS, {}, INT8) for tokens in (MANY, FEW)),
)


def plain_isa(isa: str) -> str:
    """Return the instruction set by which bars know a run, for the name that `isa.name` gives it.

    >>> plain_isa("avx512amx-amx"), plain_isa("avx512vnni-vnni"), plain_isa("avxvnni"), plain_isa("avx2")
    ('avx512-amx', 'avx512-vnni', 'avx2', 'avx2')
    """
    kernels, _, int8 = isa.partition("-")
    kernels = "avx512" if kernels.startswith("avx512") else "avx2" if kernels == "avxvnni" else kernels
    return f"{kernels}-{int8}" if int8 else kernels


def layer_bars(isa: str) -> tuple[Bar, ...]:
    """Return the claims and comparisons of an instruction set, as `isa.name` names it.

    Claims about int8 suppose VNNI with AVX-512, and none with AVX2; other sets are only compared.
    """
    isa = plain_isa(isa)
    claims: tuple[Bar, ...] = _AVX512_FLOAT if isa.startswith("avx512") else _AVX2_FLOAT
    claims += {"avx512-vnni": _AVX512_SMALL, "avx2": _AVX2_SMALL}.get(isa, ())
    claimed = {(bar.group, bar.tokens, bar.against, bar.ours) for bar in claims}
    others = (*_COMPARISONS, *_SMALL_COMPARISONS)
    return claims + tuple(bar for bar in others if (bar.group, bar.tokens, bar.against, bar.ours) not in claimed)


#: Kernels of an instruction set -> sparsity -> share of the multiply-add peak, at 128 and 512 tokens
KERNEL_BARS = {"avx512": _steps(0.65, 0.55, 0.50, 0.42, 0.35), "avx2": _steps(0.66, 0.60, 0.56, 0.47, 0.40)}
#: Kernels of an instruction set -> (model, candidate, sparsity) -> times torch fp32, at every batch size
MODEL_BARS = {
    "avx512": {
        ("vit_b_16", OURS, 0.9): 3.5,
        ("swin_t", OURS, 0.9): 2.3,
        ("convnext_tiny", OURS, 0.9): 2.5,
        ("minilm", OURS, 0.9): 3.0,
        ("minilm", OURS, 0.5): 1.6,
    },
    "avx2": {
        ("vit_b_16", OURS, 0.9): 4.0,
        ("convnext_tiny", OURS, 0.9): 2.8,
        ("minilm", OURS, 0.9): 3.0,
        **{(model, OURS, 0.5): 1.5 for model in ("vit_b_16", "convnext_tiny", "minilm")},
    },
}
#: Times as fast as the best dense float32, at every batch size
_BEST_CNN_BARS = {("resnet50", OURS, s): {"32": factor} for s, factor in ((0.8, 1.7), (0.9, 2.5))}
#: Instruction set -> (model, candidate, sparsity) -> engines whose names end so -> times as fast as the fastest of them
BEST_MODEL_BARS: dict[str, dict[tuple[str, str, float], dict[str, float]]] = {
    "avx512-amx": _BEST_CNN_BARS,
    "avx512-vnni": {("bert_base", INT8, 0.9): {"int8": 2.0, "ONNX Runtime float32": 6.5}, **_BEST_CNN_BARS},
    "avx2": _BEST_CNN_BARS,
}
#: Kernels of an instruction set -> sparsity -> times as fast as the best dense float32 convolution
CONVOLUTION_BARS = {"avx512": {0.8: 2.4, 0.9: 4.0}, "avx2": {0.8: 2.0, 0.9: 3.2}}
#: 99th percentile beside a busy process, over the median without it, at most
LOAD_BAR = 4.0
#: Time on the library's own threads over that on OpenMP's: at most this, over all layers
TEAM_BAR = 1.05
#: Time of a model outside of Python over that in Python: at most this
DEPLOYED_BAR = 1.05


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
            if row["candidate"] == bar.ours and row["sparsity"] == sparsity:
                ours[cell] = row["median_us"]
            elif row["candidate"] in OPPONENTS[bar.against] and row["sparsity"] in (None, sparsity):
                theirs.setdefault(cell, {})[row["candidate"]] = row["median_us"]
    if needed := NEEDED.get(bar.against):
        theirs = {cell: times for cell, times in theirs.items() if any(engine in times for engine in needed)}
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

"""Whole layers: CSRLinear as export(format="auto") makes it, against every peer, everything included."""

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sparsify
from benchmarks import peers, record, weights
from benchmarks.cases import Grid, Shape
from sparsify.hardware.timing import Call, measure, settle
from sparsify.inference.form_selection import FormSelector

OURS, BF16, INT8, INT8_BLOCKS = "sparsify", "sparsify bf16", "sparsify int8", "sparsify int8 1x4"
CACHED, BEYOND_CACHE = "cached", "beyond cache"


@dataclass(frozen=True)
class Kind:
    """One of our layers: the pattern of its mask, its dtype, and the options of its export."""

    pattern: str = "unstructured"
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


KINDS = {
    OURS: Kind(),
    BF16: Kind(dtype=torch.bfloat16),
    INT8: Kind(options={"quantize": "int8"}),
    INT8_BLOCKS: Kind("1x4", options={"quantize": "int8"}),
}

Pruned = dict[tuple[str, float], sparsify.SparseLinear]


@torch.inference_mode()
def run(grid: Grid, without: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate of each shape and number of tokens, at every sparsity it depends on.

    The peers named in `without` are left out: torch csr takes most of a run's time.

    Dense peers gain nothing from zeros: they appear once, with sparsity None. All candidates of a shape and a number
    of tokens are timed in turns. Raises RuntimeError if one of them gives a wrong answer.
    """
    cells = [(shape, tokens, CACHED) for shape in grid.shapes for tokens in grid.tokens]
    cells += [(shape, 1, BEYOND_CACHE) for shape in grid.large]
    masks = [("unstructured", s) for s in grid.sparsities] + [("1x4", s) for s in grid.block_sparsities]
    pruned: Pruned = {}
    last = None
    for shape, tokens, group in tqdm(cells, desc="layers"):
        if shape != last:
            pruned, last = {mask: weights.pruned_layer(shape, mask[1], mask[0]) for mask in masks}, shape
        cell = _Cell(shape, tokens, group, without)
        cell.add_dense(pruned["unstructured", grid.sparsities[0]])
        for (pattern, sparsity), layer in pruned.items():
            if pattern == "unstructured":
                cell.add_sparse_peers(layer, sparsity)
            for name, kind in KINDS.items():
                if kind.pattern == pattern:
                    cell.add_ours(name, kind, layer, sparsity)
        yield from cell.measure(grid.rounds)


class _Cell:
    """The candidates of one shape and number of tokens: their calls, and what the rows say of each."""

    def __init__(self, shape: Shape, tokens: int, group: str, without: Collection[str]) -> None:
        self.without = without
        self.common = {"shape": list(shape), "tokens": tokens, "group": group}
        self.cold = group == BEYOND_CACHE
        self.x = weights.inputs(shape, tokens)
        self.calls: dict[tuple[str, float | None], list[Call]] = {}
        self.facts: dict[tuple[str, float | None], dict[str, Any]] = {}

    def add_dense(self, layer: sparsify.SparseLinear) -> None:
        """Add the dense peers, each in its fastest variant."""
        weight, bias = weights.dense_tensors(layer)
        for name in peers.dense_peers():
            if name in self.without or (self.cold and name in peers.COMPILED):
                continue
            variant, make = peers.fastest(name, weight, bias, self.x)
            n = weights.n_copies(weight.numel() * peers.item_bytes(name))
            self._add((name, None), layer, n, partial(_with_own_weight, make, weight, bias, self.x), variant)

    def add_sparse_peers(self, layer: sparsify.SparseLinear, sparsity: float) -> None:
        """Add the peers that store a weight sparse."""
        weight, bias = weights.dense_tensors(layer)
        n = weights.n_copies(8 * int(layer.mask.sum()))
        for name, peer in peers.SPARSE.items():
            if name not in self.without:
                self._add((name, sparsity), layer, n, partial(peer, weight, bias, self.x))

    def add_ours(self, name: str, kind: Kind, layer: sparsify.SparseLinear, sparsity: float) -> None:
        """Add a layer as `export` makes it."""
        settle()  # threads of a peer that spin on would disturb the choice
        x = self.x.to(kind.dtype)
        masked = copy.deepcopy(layer).to(kind.dtype)
        fast = (
            _from_memory(masked, x, **kind.options) if self.cold else sparsify.export(masked, example=x, **kind.options)
        )
        form = fast.form if isinstance(fast, sparsify.CSRLinear) else "dense"
        n = weights.n_copies(sparsify.report(fast).layers.n_bytes)
        self._add((name, sparsity), layer, n, partial(_copy, fast, x), form)

    def measure(self, rounds: int) -> Iterator[dict[str, Any]]:
        """Time all candidates in turns; yield their rows."""
        for key, timing in measure(self.calls, rounds=rounds).items():
            yield record.row(timing=timing, **self.facts[key] | self.common)

    def _add(
        self,
        key: tuple[str, float | None],
        layer: sparsify.SparseLinear,
        n: int,
        make: Callable[[], Call],
        form: str = "",
    ) -> None:
        weight, bias = weights.dense_tensors(layer)
        right = self.x.double() @ weight.double().t() + bias.double()
        self.calls[key] = [make() for _ in range(n if self.cold else 1)]
        # The first call of a layer of ours checks its index: that of each copy, or it would be timed.
        found = max(peers.check(key[0], call(), right) for call in self.calls[key])
        candidate, sparsity = key
        self.facts[key] = {
            "candidate": candidate,
            "sparsity": sparsity,
            "form": form,
            "copies": len(self.calls[key]),
            "error": found,
        }


def _from_memory(layer: sparsify.SparseLinear, x: Tensor, quantize: str | None = None) -> nn.Module:
    """Export a layer as if it were one of many in a model larger than any cache."""
    form = FormSelector(x.shape[0], model_bytes=1 << 50).choose(layer, x, quantize or "").form
    return sparsify.export(layer, format=form, quantize=None if form == "dense" else quantize)


def _with_own_weight(peer: peers.Peer, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    return peer(weight.clone(), bias, x)


def _copy(layer: nn.Module, x: Tensor) -> Call:
    own = copy.deepcopy(layer)
    return lambda: own(x)

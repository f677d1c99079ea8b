"""Whole layers: CSRLinear as export(format="auto") makes it, against every peer, everything included."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sparsify
from benchmarks import peers, record, weights
from benchmarks.cases import Grid, Shape
from sparsify.hardware.timing import Call, measure, settle

OURS = "sparsify"
CACHED, BEYOND_CACHE = "cached", "beyond cache"

_ITEM_BYTES = {"torch bf16": 2, "torch int8": 1}


@torch.inference_mode()
def run(grid: Grid) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate of each shape and number of tokens, at every sparsity it depends on.

    Dense peers gain nothing from zeros: they appear once, with sparsity None. All candidates of a shape and a number
    of tokens are timed in turns. Raises RuntimeError if one of them gives a wrong answer.
    """
    cells = [(shape, tokens, CACHED) for shape in grid.shapes for tokens in grid.tokens]
    cells += [(shape, 1, BEYOND_CACHE) for shape in grid.large]
    pruned: dict[float, sparsify.SparseLinear] = {}
    last = None
    for shape, tokens, group in tqdm(cells, desc="layers"):
        if shape != last:
            pruned, last = {s: weights.pruned_layer(shape, s) for s in grid.sparsities}, shape
        yield from _run_cell(shape, tokens, group, pruned, grid.rounds)


def _run_cell(
    shape: Shape, tokens: int, group: str, pruned: dict[float, sparsify.SparseLinear], rounds: int
) -> Iterator[dict[str, Any]]:
    x = weights.inputs(shape, tokens)
    calls: dict[tuple[str, float | None], list[Call]] = {}
    facts: dict[tuple[str, float | None], dict[str, Any]] = {}

    def add(name: str, sparsity: float | None, right: Tensor, n: int, make: Callable[[], Call], form: str = "") -> None:
        copies = [make() for _ in range(n if group == BEYOND_CACHE else 1)]
        key = (name, sparsity)
        calls[key] = copies
        found = max(peers.check(name, call(), right) for call in copies[:2])
        facts[key] = {"candidate": name, "sparsity": sparsity, "form": form, "copies": len(copies), "error": found}

    for number, (sparsity, layer) in enumerate(pruned.items()):
        weight, bias = weights.dense_tensors(layer)
        right = x.double() @ weight.double().t() + bias.double()
        if number == 0:
            for name, peer in peers.dense_peers().items():
                n = weights.n_copies(weight.numel() * _ITEM_BYTES.get(name, 4))
                add(name, None, right, n, partial(_with_own_weight, peer, weight, bias, x))
        for name, peer in peers.SPARSE.items():
            add(name, sparsity, right, weights.n_copies(8 * int(layer.mask.sum())), partial(peer, weight, bias, x))
        settle()  # threads of a peer that spin on would disturb the choice
        fast: nn.Module = sparsify.export(layer, tokens=tokens)
        form = fast.form if isinstance(fast, sparsify.CSRLinear) else "dense"
        add(OURS, sparsity, right, weights.n_copies(sparsify.report(fast).total.n_bytes), partial(_copy, fast, x), form)
    common = {"shape": list(shape), "tokens": tokens, "group": group}
    for key, timing in measure(calls, rounds=rounds).items():
        yield record.row(timing=timing, **facts[key] | common)


def _with_own_weight(peer: peers.Peer, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    return peer(weight.clone(), bias, x)


def _copy(layer: nn.Module, x: Tensor) -> Call:
    own = copy.deepcopy(layer)
    return lambda: own(x)

"""Latency under load: a layer's 99th percentile while another process keeps one core busy, its median without."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import sparsify
from benchmarks import record, weights
from benchmarks.cases import Grid
from benchmarks.layers import OURS
from benchmarks.processes import seconds_of_calls
from sparsify.hardware.timing import Timing, settle

N_CALLS, LONGEST_S = 2000, 4.0
_BUSY = """
import os, sys
os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
parent = os.getppid()
print("busy", flush=True)
while os.getppid() == parent:
    sum(range(10000))
"""


@torch.inference_mode()
def run(grid: Grid) -> Iterator[dict[str, Any]]:
    """Yield a row for each layer without the busy process and one with it; `p99_us` is over single calls."""
    cells = [(shape, tokens, s) for shape in grid.shapes for tokens in grid.tokens for s in grid.sparsities]
    for shape, tokens, sparsity in tqdm(cells, desc="load"):
        layer = weights.pruned_layer(shape, sparsity)
        x = weights.inputs(shape, tokens)
        candidates: dict[str, nn.Module] = {
            "torch fp32": sparsify.export(layer, format="dense"),
            OURS: sparsify.export(layer, tokens=tokens),
        }
        for busy in (False, True):
            other = start_busy_process() if busy else None
            try:
                for name, module in candidates.items():
                    times_s = _single_calls(module, x)
                    yield row_of_calls(name, times_s, shape=list(shape), tokens=tokens, sparsity=sparsity, busy=busy)
            finally:
                if other:
                    other.terminate()
                    other.communicate()


def row_of_calls(name: str, times_s: list[float], **about: Any) -> dict[str, Any]:
    """Return the row of a candidate's single calls, given their sorted seconds, with the 99th percentile."""
    return record.row(name, Timing.of(times_s), **about, p99_us=round(1e6 * times_s[int(0.99 * len(times_s))], 1))


def start_busy_process() -> subprocess.Popen[str]:
    """Start a process that keeps one core busy until it is ended."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "busy":
        raise RuntimeError("the busy process did not start")
    return process


def _single_calls(module: nn.Module, x: torch.Tensor) -> list[float]:
    """Return the sorted seconds of each of many calls."""
    settle()
    return sorted(seconds_of_calls(lambda: module(x), N_CALLS, LONGEST_S))

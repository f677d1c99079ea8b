"""Times of calls on a GPU: replays of a CUDA graph, over more weights than its cache holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsify.hardware.timing import SAMPLE_S, Call, Key, Timing, measure

#: Weights called in rotation hold this many times the L2 cache together, but are at most so many.
TIMES_L2, MOST_COPIES = 2, 256

#: The size of the copy that measures the memory's bandwidth.
COPY_BYTES = 1 << 30


def n_copies(weight_bytes: int, device: torch.device) -> int:
    """Return how many weights of this size have to be called in rotation to find the L2 cache cold."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_COPIES, math.ceil(TIMES_L2 * l2_bytes / max(weight_bytes, 1))))


def measure_replays(
    candidates: Mapping[Key, Sequence[Call]], device: torch.device, *, rounds: int = 11, sample_s: float = SAMPLE_S
) -> dict[Key, Timing]:
    """Time candidates in turns, as `measure` does, each captured once in a CUDA graph of all its calls: per call.

    So neither Python nor the launch is counted, as in a program that replays graphs itself.
    """
    with torch.cuda.device(device):
        replays = {name: [_captured(calls)] for name, calls in candidates.items()}
        timings = measure(replays, rounds=rounds, sample_s=sample_s, wait=torch.cuda.synchronize)
    return {name: timing.over(len(candidates[name])) for name, timing in timings.items()}


def copy_gbs(device: torch.device) -> float:
    """Measure the memory's bandwidth: GB/s, read and written, of a large copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    timing = measure_replays({"copy": [copy]}, device)["copy"]
    return 2e-9 * COPY_BYTES / timing.median_s


def _captured(calls: Sequence[Call]) -> Call:
    """Make all the calls, to compile every kernel; capture them in a graph, and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls[:3], *calls[:3]):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay

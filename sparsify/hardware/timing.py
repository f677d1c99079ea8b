"""Times of calls, side by side: all in turns, so a disturbance of the machine disturbs each alike."""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

import torch

from sparsify.kernels.cpu import library as native

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)

#: A sample is the mean of as many calls as fit this time, after untimed calls that fill caches and wake threads.
SAMPLE_S, WARM_UP_S = 5e-3, 2e-3

#: A slow call gets fewer samples than the others once it has taken this long altogether, but never fewer than this.
BUDGET_S, FEWEST_ROUNDS = 2.0, 3

#: Other processes may take this many cores before a measurement is called disturbed.
QUIET_CORES = 0.1

#: How long to wait at most for threads of other libraries that spin on after their last call.
LONGEST_SETTLE_S = 0.15


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes: the median sample, the quartiles around it, and the number of samples."""

    median_s: float
    low_s: float
    high_s: float
    n: int

    @classmethod
    def of(cls, samples_s: Sequence[float]) -> Timing:
        """Summarize samples.

        >>> Timing.of([3.0, 1.0, 2.0])
        Timing(median_s=2.0, low_s=1.5, high_s=2.5, n=3)
        """
        low, _, high = quantiles(samples_s, n=4, method="inclusive") if len(samples_s) > 1 else [samples_s[0]] * 3
        return cls(median(samples_s), low, high, len(samples_s))

    def over(self, n_calls: int) -> Timing:
        """Return the time of each of several calls, timed as one."""
        return Timing(self.median_s / n_calls, self.low_s / n_calls, self.high_s / n_calls, self.n)

    def __str__(self) -> str:
        return f"{self.median_s * 1e3:.3g} ms ({self.low_s * 1e3:.3g} to {self.high_s * 1e3:.3g}, n={self.n})"


def measure(
    candidates: Mapping[Key, Sequence[Call]],
    *,
    rounds: int = 11,
    sample_s: float = SAMPLE_S,
    wait: Call = lambda: None,
    hopeless: float = math.inf,
) -> dict[Key, Timing]:
    """Time every candidate in each of `rounds` rounds, in an order shuffled anew (the same in every run).

    A candidate is left at two samples if the better one is `hopeless` times the best sample of all, or more.

    A candidate is one call, or several in rotation: copies of a layer, larger together than the cache. `wait` returns
    when the work of a call is done, for a device with a queue of its own.
    """
    samples: dict[Key, list[float]] = {name: [] for name in candidates}
    rotations = {name: itertools.cycle(calls) for name, calls in candidates.items()}
    used_s = dict.fromkeys(candidates, 0.0)
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    for round_ in range(rounds):
        shuffle(order)
        for name in order:
            if round_ >= FEWEST_ROUNDS and used_s[name] > BUDGET_S:
                continue
            if round_ >= 2 and min(samples[name]) >= hopeless * min(map(min, samples.values())):
                continue
            start = time.perf_counter()
            samples[name].append(_sample(rotations[name], sample_s, wait))
            used_s[name] += time.perf_counter() - start
    return {name: Timing.of(s) for name, s in samples.items()}


def measure_cold(candidates: Mapping[Key, Call], n_bytes: int, *, rounds: int = 11) -> dict[Key, Timing]:
    """Time calls in turns that find nothing they read in a cache of `n_bytes`: other memory fills it before each."""
    others = torch.ones(3 * n_bytes // 8)  # half as much again, since a cache does not drop the oldest first
    samples: dict[Key, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    for call in candidates.values():
        call()
    settle()
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            others.sum()
            start = time.perf_counter()
            candidates[name]()
            samples[name].append(time.perf_counter() - start)
    return {name: Timing.of(s) for name, s in samples.items()}


class LoadMeter:
    """Watches, from its creation on, how much of the machine other processes take."""

    def __init__(self) -> None:
        self._start = _cpu_seconds()

    def others_cores(self) -> float:
        """Return how many cores other processes have kept busy, on average."""
        wall, busy, own = (now - then for now, then in zip(_cpu_seconds(), self._start, strict=True))
        return round(max(0.0, (busy - own) / max(wall, 1e-3)), 2)


def disturbance(others_cores: float) -> str:
    """Describe the work of other processes, and warn if figures cannot be relied on.

    >>> disturbance(1.5)
    'NOT TO BE RELIED ON: other processes kept 1.5 cores busy meanwhile'
    """
    text = f"other processes kept {others_cores:g} cores busy meanwhile"
    return text if others_cores <= QUIET_CORES else f"NOT TO BE RELIED ON: {text}"


def settle() -> None:
    """Wait until this process is idle: ONNX Runtime's threads, for one, spin on for up to 100 ms after a call.

    Our kernels use all threads from here on, whatever happened before.
    """
    native.forget_stalls()
    end = time.perf_counter() + LONGEST_SETTLE_S
    while time.perf_counter() < end:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(1e-3)
        if time.process_time() - cpu < 0.2 * (time.perf_counter() - wall):
            return


def _cpu_seconds() -> tuple[float, float, float]:
    """Return the time now, and the seconds of computing of all processes and of this one with its children."""
    own = sum(os.times()[:4])
    try:
        # user, nice, system, idle, iowait, irq, softirq, steal, in clock ticks
        ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return time.monotonic(), own, own
    return time.monotonic(), (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own


def _sample(rotation: itertools.cycle[Call], sample_s: float, wait: Call) -> float:
    settle()
    start = time.perf_counter()
    n_calls = 0
    while n_calls < 2 or time.perf_counter() - start < min(WARM_UP_S, sample_s):
        next(rotation)()
        wait()  # each time: a device that works on its own would be given calls for seconds
        n_calls += 1
        if time.perf_counter() - start > 4 * sample_s:  # one call is longer than a sample: warm enough
            break
    repeats = max(1, int(sample_s * n_calls / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(repeats):
        next(rotation)()
    wait()
    return (time.perf_counter() - start) / repeats

"""The time of a whole model, dense against exported, on given inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from sparsify.conversion.convert import to_dense
from sparsify.hardware.machine import machine_name
from sparsify.hardware.timing import QUIET_CORES, LoadMeter, Timing, disturbance, measure
from sparsify.reporting.model_run import Inputs, run

#: A measurement on a busy machine is made so many times at most.
N_TRIES = 2


@dataclass(frozen=True)
class ModelSpeed:
    """Times of an exported model and of its dense form; others_cores: number of cores busy with other processes."""

    dense: Timing
    sparse: Timing
    machine: str
    others_cores: float

    @property
    def speedup(self) -> float:
        """Time of the dense model divided by that of the exported one."""
        return self.dense.median_s / self.sparse.median_s

    def __str__(self) -> str:
        return (
            f"{self.speedup:.2f}x dense: {self.sparse} against {self.dense}\n"
            f"{self.machine}; {disturbance(self.others_cores)}"
        )


@torch.inference_mode()
def model_speed(fast: nn.Module, inputs: Inputs, *, rounds: int = 7) -> ModelSpeed:
    """Time an exported model and its dense form in turns, with torch's threads; on a busy machine twice.

    The dense form is a copy by `to_dense`, with the zeros: a dense layer takes the same time for any weights.
    """
    dense = to_dense(copy.deepcopy(fast)).eval()
    calls = {"dense": [lambda: run(dense, inputs)], "sparse": [lambda: run(fast, inputs)]}
    best: ModelSpeed | None = None
    for _ in range(N_TRIES):
        watch = LoadMeter()
        times = measure(calls, rounds=rounds)
        tried = ModelSpeed(times["dense"], times["sparse"], machine_name(), watch.others_cores())
        if best is None or tried.others_cores < best.others_cores:
            best = tried
        if best.others_cores <= QUIET_CORES:
            break
    assert best is not None
    return best

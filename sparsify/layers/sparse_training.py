"""Sparse training steps of a layer: kernels for the kept weights only, if faster than the dense step."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from sparsify.kernels.cpu import library as native
from sparsify.kernels.cpu import sparse_step as training
from sparsify.kernels.cpu.sparse_step import StepIndex
from sparsify.layers.masked_weight import kept

SparseBackward = Literal["never", "auto", "always"]

#: Below this sparsity the dense step was faster in every measurement, so the sparse one is not tried.
TRY_FROM = 0.7
N_TRIES = 3


class SparseTrainingKernels:
    """The packed mask of one layer, and the numbers of input rows with a faster sparse step.

    A mask is packed and, unless `always`, timed once, at the first step after its change. Sparse and dense steps give
    the same results up to the order of additions. Sparse steps are for float32 on the CPU; all others are dense.
    """

    def __init__(self, always: bool) -> None:
        self.always = always
        self.index: StepIndex | None = None
        self.seen: tuple[Tensor, int] | None = None
        self.faster: dict[int, bool] = {}

    def index_for(self, layer: Any, x: Tensor) -> StepIndex | None:
        """Return the packed mask for a sparse step, or None for a dense one."""
        weight, mask = layer.weight, layer.mask
        if not _can(layer, x):
            return None
        if self.seen is None or self.seen[0] is not mask or self.seen[1] != mask._version:
            self.seen, self.faster = (mask, mask._version), {}
            self.index = StepIndex.of(mask) if self.always or layer.sparsity >= TRY_FROM else None
        if self.index is None or self.always:
            return self.index
        n_rows = x.numel() // max(x.shape[-1], 1)
        if n_rows not in self.faster:
            self.faster[n_rows] = _is_faster(self.index, x, weight, mask)
        return self.index if self.faster[n_rows] else None


def _can(layer: Any, x: Tensor) -> bool:
    """Return whether the kernels fit a step: float32 on the CPU, with gradients of the kept weights only."""
    tensors = [t for t in (x, layer.weight, layer.bias) if t is not None]
    if not all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors):  # also the stand-ins of a tracer
        return False
    right = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and layer.weight.is_contiguous()
    trains = torch.is_grad_enabled() and layer.weight.requires_grad
    plain = layer.masked_mode != "trained" and layer.accumulator is None and not torch.is_autocast_enabled("cpu")
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or _is_transformed(tensors)
    return right and trains and plain and not traced and x.numel() > 0 and native.available()


def _is_transformed(tensors: list[Tensor]) -> bool:
    """Return whether torch.func's transforms or forward-mode derivatives are active: those steps are dense."""
    return torch._C._are_functorch_transforms_active() or any(unpack_dual(t).tangent is not None for t in tensors)


def _is_faster(index: StepIndex, x: Tensor, weight: Tensor, mask: Tensor) -> bool:
    """Return whether a sparse step is faster than a dense one: the best of N_TRIES each, in turns."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    times: dict[bool, float] = {}
    for _ in range(N_TRIES):
        for sparse in (True, False):
            start = time.perf_counter()
            y = training.linear(x, weight, None, index) if sparse else F.linear(x, kept(weight, mask))
            torch.autograd.grad(y, (x, weight), torch.ones_like(y))
            times[sparse] = min(times.get(sparse, float("inf")), time.perf_counter() - start)
    return times[True] < times[False]

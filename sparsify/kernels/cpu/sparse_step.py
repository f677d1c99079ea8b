"""A training step of a very sparse layer: forward, gradient of the input, and of the kept weights only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.cpu import library as native
from sparsify.kernels.cpu import training


@dataclass
class StepIndex:
    """The kept positions of a mask (out, in), packed for forward and backward; values are gathered at each step.

    `flat` are the kept positions of the weight, in the order of CSR (`crow`, `col`); `order` and `order_t`
    hold, for each packed value of the weight and of its transpose, its number in `flat`, the last (a zero) for padding.
    """

    shape: tuple[int, int]
    crow: Tensor
    col: Tensor
    flat: Tensor
    index: Tensor
    order: Tensor
    index_t: Tensor
    order_t: Tensor
    memory: GradMemory

    @classmethod
    def of(cls, mask: Tensor) -> StepIndex:
        """Pack a bool mask on the CPU."""
        out, inner = mask.shape
        flat = mask.flatten().nonzero().flatten()
        rows, columns = flat // max(inner, 1), flat % max(inner, 1)
        turned = columns.argsort(stable=True)
        crow, crow_t = _pointers(rows, out), _pointers(columns, inner)
        numbers = torch.arange(1, len(flat) + 1, device=mask.device)  # 0 is padding
        index, packed = native.pack("panel", crow, columns, numbers, (out, inner))
        index_t, packed_t = native.pack("panel", crow_t, rows[turned], numbers[turned], (inner, out))
        order, order_t = ((p - 1).where(p > 0, len(flat)) for p in (packed, packed_t))
        return cls((out, inner), crow, columns.int(), flat, index, order, index_t, order_t, GradMemory())

    def mask(self) -> Tensor:
        """Return the packed mask (out, in)."""
        return (
            self.flat.new_zeros(self.shape, dtype=torch.bool).view(-1).index_fill(0, self.flat, True).view(self.shape)
        )


@dataclass
class GradMemory:
    """The memory of a weight's gradient, used again in the next step if nobody holds the last one any more.

    Fresh memory of 64 MiB costs more, in page faults, than all of the multiplying at 95%; here only kept positions are
    written again.
    """

    zeros: Tensor | None = None
    version: int = 0

    def take(self, shape: tuple[int, int]) -> Tensor:
        """Return a gradient (out, in), zero at all positions that will not be written."""
        if self.zeros is None or _n_users(self.zeros) > 1:  # accumulating, or somebody keeps it
            self.zeros = torch.zeros(shape, dtype=torch.float32, device="cpu")
        elif self.zeros._version != self.version:  # clipped, unscaled, or made noisy
            self.zeros.zero_()
        self.version = self.zeros._version
        return self.zeros.detach()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, index: StepIndex) -> Tensor:
    """Multiply x (..., in) by the kept weights, float32 on the CPU, with gradients for x, bias and the kept weights."""
    y: Tensor = _SparseStep.apply(x, weight, bias, index)
    return y


class _SparseStep(torch.autograd.Function):
    """x @ (weight * mask).T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: StepIndex) -> Tensor:
        """Gather the kept values, and multiply."""
        values = weight.new_zeros(len(index.flat) + 1)
        torch.index_select(weight.view(-1), 0, index.flat, out=values[:-1])
        ctx.index = index
        ctx.weight, ctx.version = weight, weight._version  # not saved: it may change, as under where(mask, weight, 0)
        ctx.save_for_backward(x, values)
        y = native.linear("panel", x.reshape(-1, index.shape[1]), index.index, values[index.order], bias, index.shape)
        return y.view(*x.shape[:-1], index.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply by the transpose; take products of kept positions only."""
        index: StepIndex = ctx.index
        x, values = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: these gradients are differentiated again
            return _differentiable(ctx, x, grad)
        grad_x = grad_weight = grad_bias = None
        rows = grad.reshape(-1, index.shape[0])
        if ctx.needs_input_grad[0]:
            turned = (index.shape[1], index.shape[0])
            grad_x = native.linear("panel", rows, index.index_t, values[index.order_t], None, turned).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = index.memory.take(index.shape)
            training.weight_grad(rows, x.reshape(-1, index.shape[1]), index.crow, index.col, grad_weight)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _differentiable(ctx: Any, x: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the same gradients by differentiable dense products."""
    index: StepIndex = ctx.index
    if ctx.weight._version != ctx.version:
        raise RuntimeError("a weight has changed between the forward and a backward that is differentiated again")
    mask = index.mask()
    rows = grad.reshape(-1, index.shape[0])
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.where(mask, ctx.weight, 0.0)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.where(mask, rows.T @ x.reshape(-1, index.shape[1]), 0.0)
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias, None


def _pointers(rows: Tensor, n_rows: int) -> Tensor:
    """Return the row pointers of CSR: the running count of entries by row."""
    counts = torch.bincount(rows, minlength=n_rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def _n_users(tensor: Tensor) -> int:
    """Return how many tensors use a tensor's memory, in Python and in autograd."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # the one just made to ask

"""The distance of a model from its teacher in a distillation: of hidden states between blocks, and of logits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.calibration.batches import Batch, input_rows
from sparsify.calibration.block_call import output_tensor
from sparsify.calibration.padding import Padding

#: Logits that are compared at once: what is computed of so many stays in a cache.
_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class Outputs:
    """The hidden states after blocks, by name, and the logits of a model in one run."""

    hidden: Mapping[str, Tensor]
    logits: Tensor | None

    @property
    def n_bytes(self) -> int:
        """The memory of all."""
        return sum(tensor.nbytes for tensor in (*self.hidden.values(), self.logits) if tensor is not None)


@dataclass(frozen=True)
class Compared:
    """The outputs of a model that are compared.

    blocks: names of the modules with hidden states
    logits: compare logits: yes, no, or (None) those in an output with a field of this name
    """

    blocks: Sequence[str]
    logits: bool | None

    def of(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run a batch, and return what is compared: of each block the first tensor in its output."""
        hidden: dict[str, Tensor] = {}

        def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden[name] = output_tensor(output)

        with contextlib.ExitStack() as hooks:
            for name in self.blocks:
                hook = functools.partial(record, name)
                hooks.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            output = model(*batch.args, **batch.kwargs)
        return Outputs({name: hidden[name] for name in self.blocks}, self._logits_of(output))

    def _logits_of(self, output: Any) -> Tensor | None:
        if self.logits is False:
            return None
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if isinstance(found, Tensor) and found.is_floating_point() and found.dim() in (2, 3):  # not (n, classes, h, w)
            return found
        return output_tensor(output) if self.logits else None


def distance(found: Outputs, wanted: Outputs, padding: Padding, batch: Batch) -> Tensor:
    """Return the mean over blocks of the hidden states' distance, plus the divergence of the logits if there are any.

    The distance is the squared one, relative to the variance of what is wanted. Every row counts by its size: the
    massive activations of a language model's first token too, on which the attention of all others leans. Scaled down
    to the size of other rows, they are learned too late. Padding does not count: rows of logits as many as the tokens
    of the last block are these tokens.

    Raises ValueError for logits of another shape than the teacher's.
    """
    total = torch.zeros((), device=next(iter(found.hidden.values())).device)
    for block, output in found.hidden.items():
        lead = output.shape[:-1]
        counts = padding.counts(("output", block), 0, lead, batch)
        rows, target = (input_rows(of.hidden[block], counts).float() for of in (found, wanted))
        scale = (target - target.mean(0)).square().sum() + torch.finfo(torch.float32).tiny
        total = total + F.mse_loss(rows, target, reduction="sum") / scale
    total = total / len(found.hidden)
    if found.logits is None or wanted.logits is None:
        return total
    if found.logits.shape != wanted.logits.shape:
        raise ValueError(
            f"the model's logits have the shape {tuple(found.logits.shape)}, the teacher's {tuple(wanted.logits.shape)}"
            "; give a teacher with the same classes, or logits=False"
        )
    shared = counts if found.logits.shape[:-1] == lead else None
    return total + divergence(input_rows(found.logits, shared), input_rows(wanted.logits, shared))


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean of KL(wanted || found) over rows of logits (rows, classes), in nats; its gradient is for `found`.

    It takes the memory of one gradient, and beyond that of a few rows; torch's takes several times the logits, which
    for a language model are more than all else.
    """
    result: Tensor = _Divergence.apply(found, wanted)
    return result


class _Divergence(torch.autograd.Function):
    """`divergence`, with the gradient computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, wanted: Tensor) -> Tensor:
        """Sum over rows, some at a time."""
        gradient, total = torch.empty_like(found), torch.zeros((), device=found.device)
        n_rows = max(_AT_ONCE // found.shape[1], 1)
        for some, targets, to in zip(*(t.split(n_rows) for t in (found, wanted, gradient)), strict=True):
            log_q, log_p = _log_shares(some), _log_shares(targets)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            to.copy_(log_q.exp_().sub_(p).div_(len(found)))
        ctx.save_for_backward(gradient)
        return total / max(len(found), 1)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * by.to(gradient.dtype), None


def _log_shares(logits: Tensor) -> Tensor:
    """Return the logarithms of the classes' probabilities; finite ones where a class is left out by a logit of -Inf."""
    lowest = torch.finfo(torch.float32).min / 4
    return F.log_softmax(logits.float().clamp(min=lowest), -1)


def check_outputs(outputs: Outputs) -> None:
    """Raise ValueError, naming the block, if an output of the teacher is NaN or Inf."""
    for block, target in outputs.hidden.items():
        if not torch.isfinite(target).all():
            raise ValueError(
                f"{block or '(root)'}: the teacher's output on the calibration data holds NaN or Inf; mend the data, "
                "or use float32 or bfloat16 where float16 overflows"
            )
    if outputs.logits is not None and bool((outputs.logits.isnan() | outputs.logits.isposinf()).any()):
        raise ValueError("the teacher's logits on the calibration data hold NaN or Inf; mend the data, or logits=False")

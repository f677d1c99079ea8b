"""Recovery: a short distillation of a pruned model towards the dense one.

One-shot methods mend each layer by itself. Here the kept weights of all layers, the biases and the norms are trained
together, so that the hidden states between blocks and the logits come close to those of the dense model, on the
calibration data.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sparsify.calibration.activation_store import MemoryBudget
from sparsify.calibration.batches import Batch, read_batches
from sparsify.calibration.eval_mode import eval_without_cache
from sparsify.calibration.model_trace import NEVER_RAN, trace_model
from sparsify.calibration.padding import Padding, see_padding
from sparsify.conversion.convert import sparse_layers
from sparsify.conversion.module_surgery import Model
from sparsify.conversion.transaction import Transaction
from sparsify.hardware.allocator import keeping_freed_memory
from sparsify.hardware.free_memory import free_bytes
from sparsify.layers import MaskedLayer
from sparsify.masking.unseen import refuse_unseen
from sparsify.pruning.distillation import Compared, Outputs, check_outputs, distance
from sparsify.pruning.moving_masks import MovingMasks
from sparsify.pruning.precision import check_bfloat16, computing
from sparsify.pruning.reconstruct import ramp, shuffled

LR = 3e-3


def recover(
    model: Model,
    teacher: nn.Module,
    data: Iterable[Any],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    lr: float = LR,
    seed: int = 0,
    bfloat16: bool = False,
    move: str | Mapping[str, str] | None = None,
    logits: bool | None = None,
    cache_bytes: int | None = None,
    progress: bool = False,
) -> Model:
    """Train the kept weights of a pruned model towards the teacher's hidden states, in place, and return the model.

    model: converted and pruned
    teacher: the dense model, of the same architecture, such as `copy.deepcopy(model)` from before pruning
    data: batches as for `prune`
    steps, seconds: the budget, one batch a step; with both, the first to end counts; with steps alone the result is the
        same each time
    lr: Adam's highest learning rate
    seed: for the order of the batches
    bfloat16: compute in bfloat16, and train weights that stay in float32: several times as fast on processors with
        instructions for it, many times slower on others, such as those with AVX2 alone: a SlowBfloat16Warning tells
    move: let masks move within a pattern, such as "unstructured", or within that of each layer by name (a glob); a
        layer without one keeps its mask. Each mask keeps its number of weights, and its pattern
    logits: compare the logits of both models too; None: where the model's output has a field `logits`, as those of
        transformers have. With True the output is the logits, or its first tensor
    cache_bytes: memory for the teacher's outputs, kept for the next time that a batch comes if the budget has steps
        enough for that; None: a quarter of what is free. It changes the time of a step, and no result
    progress: show a bar

    Trained are the kept weights of the masked layers and every Parameter of one dimension: biases and norms. Masks hold
    exactly, unless they may move. The loss is the mean over the blocks of the squared distance between the outputs of
    both models, relative to the variance of the teacher's outputs, plus the divergence of the logits: the mean over
    tokens or samples of KL(teacher || model), in nats. Padding does not count. Blocks are the repeated modules in a
    chain, seen in a run; a model without them is compared at its output.

    Raises ValueError before training for a missing or negative budget, a teacher with Parameters of the model, a mask
    that is not of its pattern, and data that does not run. A loss of NaN or Inf raises ValueError too, and leaves the
    model as it was.

    >>> import copy
    >>> model = sparsify.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    >>> teacher = copy.deepcopy(model)
    >>> _ = recover(sparsify.prune(model, 0.5), teacher, [torch.randn(16, 8)], steps=10)
    >>> model[0].sparsity
    0.5

    Hinton et al. 2015, arXiv:1503.02531; hidden states as in Romero et al. 2015, arXiv:1412.6550; masks that move as
    in Zhou et al. 2021, arXiv:2102.04010.
    """
    budget = _Budget(steps, seconds, lr)
    if {id(p) for p in model.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError("the teacher shares Parameters with the model; give a copy made before pruning")
    layers = sparse_layers(model)
    device = next(model.parameters()).device
    memory = MemoryBudget(free_bytes(device) // 4 if cache_bytes is None else cache_bytes)
    masks = MovingMasks(layers, move)
    if bfloat16:
        check_bfloat16(layers)
    batches = read_batches(model, data)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("the model was made inside torch.inference_mode() and cannot be trained; make it outside")
    with (
        torch.inference_mode(False),
        Transaction(model, teacher) as undo,
        keeping_freed_memory(),
        eval_without_cache(model),
        eval_without_cache(teacher),
    ):
        trace, unseen = trace_model(model, layers, batches)
        refuse_unseen(
            {name: reason for name, reason in unseen.items() if reason == NEVER_RAN}, "give data that reaches them"
        )
        blocks = [block for chain in trace.chains for block in chain] or [""]
        padding = see_padding(model, batches, [("output", block) for block in blocks])
        with _trainable(model, list(layers.values())) as parameters:
            undo.keep(parameters)
            targets = _Targets(teacher, Compared(blocks, logits), memory)
            distillation = _Distillation(model, targets, padding, bfloat16, masks)
            masks.start()
            distillation.train(parameters, batches, budget, seed=seed, progress=progress)
        masks.stop()
        for layer in layers.values():
            layer.zero_masked()
    return model


@dataclass(frozen=True)
class _Budget:
    """A number of steps, of seconds, or both, and the learning rate over it."""

    steps: int | None
    seconds: float | None
    lr: float

    def __post_init__(self) -> None:
        steps, seconds, lr = self.steps, self.seconds, self.lr
        if steps is None and seconds is None:
            raise ValueError("recover needs a budget: steps, seconds, or both")
        if (
            (steps is not None and steps < 1)
            or (seconds is not None and not 0 < seconds < math.inf)
            or not 0 < lr < math.inf
        ):
            raise ValueError(f"steps, seconds and lr must be positive and finite, got {steps}, {seconds} and {lr}")

    def spent(self) -> Iterator[float]:
        """Yield for each step the fraction of the budget spent before, until all is."""
        started = time.perf_counter()
        for step in itertools.count():
            by_steps = step / self.steps if self.steps else 0.0
            by_time = (time.perf_counter() - started) / self.seconds if self.seconds else 0.0
            if max(by_steps, by_time) >= 1:
                return
            yield max(by_steps, by_time)

    def has_room(self, step: int, spent: float, more: int) -> bool:
        """Return whether that many more steps will fit after this one, if all take as long as those before it."""
        return spent == 0 or step + more < step / spent

    def lr_at(self, spent: float) -> float:
        """Return the learning rate at a fraction of the budget."""
        return self.lr * ramp(spent)


class _Targets:
    """The teacher's outputs, batch by batch: computed once, and kept as far as the memory for them goes."""

    def __init__(self, teacher: nn.Module, compared: Compared, memory: MemoryBudget) -> None:
        self.compared, self._teacher, self._memory = compared, teacher, memory
        self._kept: dict[int, Outputs] = {}

    def of(self, number: int, batch: Batch, *, again: bool) -> Outputs:
        """Return the outputs for a batch, with its number among all; kept if it comes again."""
        if number in self._kept:
            return self._kept[number]
        with torch.no_grad():
            outputs = self.compared.of(self._teacher, batch)
        if again and self._memory.take(outputs.n_bytes):
            self._kept[number] = outputs
        return outputs


@dataclass(frozen=True)
class _Distillation:
    """A model and its targets, the padding in the blocks' outputs, and the masks that may move."""

    model: nn.Module
    targets: _Targets
    padding: Padding
    bfloat16: bool
    masks: MovingMasks

    def train(
        self,
        parameters: Sequence[nn.Parameter],
        batches: Sequence[Batch],
        budget: _Budget,
        *,
        seed: int,
        progress: bool,
    ) -> None:
        """Train the parameters until the budget is spent."""
        optimizer = torch.optim.Adam(parameters, lr=budget.lr, fused=True)
        order = shuffled(len(batches), seed)
        with tqdm(
            total=1.0,
            desc="recover",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=not progress or None,
        ) as bar:
            for step, spent in enumerate(budget.spent()):
                for group in optimizer.param_groups:
                    group["lr"] = budget.lr_at(spent)
                batch = batches[number := next(order)]
                with torch.inference_mode(False), torch.enable_grad():
                    with computing(parameters[0].device, bfloat16=self.bfloat16):
                        again = budget.has_room(step, spent, len(batches))
                        targets = self.targets.of(number, batch, again=again)
                        found = self.targets.compared.of(self.model, batch)
                        loss = distance(found, targets, self.padding, batch)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                if not math.isfinite(value := float(loss.detach())):
                    check_outputs(targets)
                    raise ValueError(f"the loss became {value} in step {step + 1}; take a lower lr than {budget.lr:g}")
                optimizer.step()
                self.masks.after_step(step + 1, spent, optimizer)
                bar.update(spent - bar.n)
                bar.set_postfix_str(f"loss {value:.4f}")


@contextlib.contextmanager
def _trainable(model: nn.Module, layers: Sequence[MaskedLayer]) -> Iterator[list[nn.Parameter]]:
    """Inside the block, let gradients reach the trained Parameters only; gradients and flags are as before afterwards.

    After an error, the transaction around restores them.
    """
    weights = {id(layer.weight) for layer in layers}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    trained = [parameter for parameter, _, _ in before if id(parameter) in weights or parameter.dim() <= 1]
    for parameter, _, _ in before:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    yield trained
    for parameter, needs_grad, grad in before:
        parameter.grad = grad
        parameter.requires_grad_(needs_grad)

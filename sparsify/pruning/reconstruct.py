"""Local reconstruction: a block's kept weights trained towards its outputs in the dense model, one block at a time.

One-shot methods mend each layer by least squares, for its own outputs. Here the layers of a block are trained together,
through all that lies between them. One block is at work: its weights, their gradients, and twice as much for Adam.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsify.calibration.data_parallel import average, most_of_all
from sparsify.calibration.tunable_block import TunableBlock
from sparsify.layers import MaskedLayer
from sparsify.pruning.precision import check_bfloat16, computing

LR = 0.05
_WARM_UP = 0.05  # of the budget; from there the learning rate falls to zero in a straight line


@dataclass(frozen=True)
class Reconstruction:
    """The options of a local reconstruction, for `prune(reconstruct=...)`.

    epochs: how often each block sees all batches, one batch a step
    lr: Adam's highest learning rate, as a part of the root mean square of a layer's kept weights
    seed: for the order of the batches
    bfloat16: compute in bfloat16, and train weights that stay in float32: several times as fast on processors with
        instructions for it; a SlowBfloat16Warning tells of others

    Raises ValueError unless epochs and lr are positive and finite.
    """

    epochs: int
    lr: float = LR
    seed: int = 0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.lr < math.inf:
            raise ValueError(f"epochs and lr must be positive and finite, got {self.epochs} and {self.lr}")


def tune_block(
    block: TunableBlock,
    layers: Mapping[str, MaskedLayer],
    options: Reconstruction,
    tell: Callable[[int, int, float], None] = lambda step, n_steps, loss: None,
) -> None:
    """Train the kept weights and the biases of a block's layers, in place. Masks hold exactly.

    The loss is the squared distance of the block's outputs from the wanted ones, relative to the variance of these;
    `tell` gets it after each step. Several processes take a step together, each with a batch of its own, and average
    their gradients. Raises ValueError, naming the block, if the loss becomes NaN or Inf, and naming the layer for
    bfloat16 without effect.

    Guo et al. 2024, arXiv:2402.12419.
    """
    chosen = [layers[name] for name in block.layers]
    if options.bfloat16:
        check_bfloat16(layers)
    n_steps = options.epochs * most_of_all(len(block))
    with torch.inference_mode(False), _trainable(block.module, chosen):
        parts = [_Trained(layer) for layer in chosen]
        optimizer = torch.optim.Adam([{"params": part.masters, "size": part.size} for part in parts], fused=True)
        for step, number in enumerate(itertools.islice(shuffled(len(block), options.seed), n_steps)):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * group["size"] * ramp(step / n_steps)
            value = _backward(block, number, computing(chosen[0].weight.device, bfloat16=options.bfloat16))
            if not math.isfinite(value):
                raise ValueError(
                    f"{block.name}: the loss of its reconstruction became {value} in step {step + 1}; take a lower lr "
                    f"than {options.lr:g}"
                )
            for part in parts:
                part.take_gradients()
            average([master.grad for part in parts for master in part.masters if master.grad is not None])
            optimizer.step()
            for part in parts:
                part.write_back()
            tell(step + 1, n_steps, value)
    for layer in chosen:
        layer.zero_masked()


def ramp(spent: float) -> float:
    """Return the part of the highest learning rate at a fraction of the budget."""
    return min(spent / _WARM_UP + 0.1, 1.0, (1 - spent) / (1 - _WARM_UP))


def shuffled(n: int, seed: int) -> Iterator[int]:
    """Yield the numbers below n forever, in a new random order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator, device="cpu").tolist()


def _backward(block: TunableBlock, number: int, precision: contextlib.AbstractContextManager[None]) -> float:
    """Run a batch forwards and backwards, and return the loss."""
    with torch.enable_grad():
        with precision:
            found, wanted = block.run(number)
        scale = (wanted - wanted.mean(0)).square().sum() + torch.finfo(torch.float32).tiny
        loss = (found - wanted).square().sum() / scale
        loss.backward()
    return float(loss.detach())


class _Trained:
    """The weight and the bias of a layer in training.

    masters: the Parameters that Adam changes; of half precision, copies in float32, which small steps do not leave
    size: the root mean square of the kept weights
    """

    def __init__(self, layer: MaskedLayer) -> None:
        self._own = list(layer.parameters(recurse=False))
        self.masters = [p if p.element_size() >= 4 else nn.Parameter(p.detach().float()) for p in self._own]
        n_kept = max(int(layer.mask.sum()), 1)
        self.size = float(layer.weight.detach().double().square().sum() / n_kept) ** 0.5

    def take_gradients(self) -> None:
        """Give the gradients of a backward pass to the masters; a Parameter without one gets zeros."""
        for own, master in zip(self._own, self.masters, strict=True):
            master.grad = torch.zeros_like(master) if own.grad is None else own.grad.to(master.dtype)
            if own is not master:
                own.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the masters into the layer, and drop the gradients."""
        for own, master in zip(self._own, self.masters, strict=True):
            master.grad = None
            if own is not master:
                own.copy_(master)


@contextlib.contextmanager
def _trainable(module: nn.Module, layers: Sequence[MaskedLayer]) -> Iterator[None]:
    """Inside the block, let gradients reach the weights and biases of these layers only."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    own = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    for parameter, _, _ in before:
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in own)
    try:
        yield
    finally:
        for parameter, needs_grad, grad in before:
            parameter.grad = grad
            parameter.requires_grad_(needs_grad)

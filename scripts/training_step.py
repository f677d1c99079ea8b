#!/usr/bin/env python
"""Time a training step of a 4096-4096-4096 MLP, dense and sparse, on the CPU.

    scripts/training_step.py --sparsity 0.95 --batch 128 --threads 2

Dense is plain torch; "masked" the same with a mask in each layer; "sparse" touches kept weights only. A step is
forward, loss and backward; then also SGD's (momentum 0.9) and, with a Pruner, the Pruner's.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify
from sparsify.hardware.machine import machine_name
from sparsify.layers.sparse_training import SparseBackward

N_STEPS = 15


def main() -> None:
    """Print both tables, and the largest difference of the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine_name()}, {options.threads} threads, torch {torch.__version__}")
    x, y = torch.randn(options.batch, options.width), torch.randn(options.batch, options.width)
    losses: dict[str, list[float]] = {}
    for with_optimizer in (False, True):
        steps = {kind: _step(kind, options, x, y, with_optimizer) for kind in ("dense", "masked", "sparse")}
        times: dict[str, list[float]] = {kind: [] for kind in steps}
        losses = {kind: [] for kind in steps}
        for _ in range(N_STEPS):  # in turns: a disturbance hits all alike
            for kind, step in steps.items():
                start = time.perf_counter()
                losses[kind].append(step())
                times[kind].append(time.perf_counter() - start)
        medians = {kind: statistics.median(t[3:]) for kind, t in times.items()}
        print("\nwith the optimizer" if with_optimizer else "\nforward, loss and backward")
        for kind, median in medians.items():
            spread = f"{min(times[kind][3:]) * 1e3:.1f} to {max(times[kind][3:]) * 1e3:.1f}"
            print(f"  {kind:7} {median * 1e3:7.1f} ms ({spread}), {medians['dense'] / median:.2f}x")
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses["masked"], losses["sparse"], strict=True))
    print(f"\nlosses of {N_STEPS} steps, masked against sparse: at most {apart:.1e} of the loss apart")


def _step(kind: str, options: argparse.Namespace, x: Tensor, y: Tensor, with_optimizer: bool) -> Callable[[], float]:
    """Build a model and return one step of it."""
    torch.manual_seed(0)
    width = options.width
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    optimizer, pruner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), None
    if kind != "dense":
        recipe = sparsify.Recipe.model_validate({"groups": [{"sparsity": options.sparsity}]})
        choice: SparseBackward = "always" if kind == "sparse" else "never"
        pruner = sparsify.Pruner(sparsify.convert(model), recipe, optimizer=optimizer, sparse_backward=choice)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        if with_optimizer:
            optimizer.step()
            if pruner is not None:
                pruner.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main()

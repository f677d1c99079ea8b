"""One training run: model, recipe, optimizer, epochs, score."""

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import sparsify
from sparsify.layers import MaskedLayer
from sparsify.pruning.precision import lstms_that_run
from training.data import Examples, batches
from training.rows import ROWS, Row
from training.tasks import TASKS, Task, loss, score

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
SNIP_BATCH = 1024


def run(
    row: str, sparsity: float, seed: int, data: tuple[Examples, Examples], model_name: str = "mlp"
) -> list[dict[str, Any]]:
    """Train one row; returns its result, and after the dense model the results of the rows that prune it trained."""
    chosen, task, began = ROWS[row], TASKS[model_name], time.time()
    torch.manual_seed(seed)
    model = task.model()
    train, test = data
    optimizer = task.optimizer(model.parameters(), **task.options)
    n_batches = -(-len(train[1]) // task.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.epochs * n_batches)
    pruner = (
        None
        if chosen is None or chosen.after
        else _pruner(model, chosen, sparsity, seed, optimizer, n_batches, train, task)
    )
    for epoch in tqdm(range(task.epochs), desc=f"{model_name}, {row}, {sparsity:g}, seed {seed}", disable=None):
        model.train()
        for inputs, labels in batches(train, task.batch, seed * 1000 + epoch):
            _step(model, inputs, labels, optimizer, task)
            schedule.step()
            if pruner is not None:
                pruner.step()
        if pruner is not None:
            pruner.end_epoch()
    if pruner is not None:
        pruner.finish()
    facts = {"model": model_name, "seed": seed, "epochs": task.epochs, "train_s": round(time.time() - began, 1)}
    facts["torch"] = torch.__version__
    if chosen is not None and not chosen.after:
        return [{"row": row, "sparsity": sparsity, **_counted(model), **_scored(model, test, task), **facts}]
    found = [{"row": "dense", "sparsity": 0.0, "zeros": 0.0, **_scored(model, test, task), **facts}]
    for name, other in ROWS.items():
        for target in task.sparsities if other is not None and other.after else ():
            assert other is not None
            pruned = sparsify.convert(copy.deepcopy(model), types=task.types)
            sparsify.apply(pruned, _recipe(other, target, seed, task.epochs))
            found.append({"row": name, "sparsity": target, **_counted(pruned), **_scored(pruned, test, task), **facts})
    return found


def _step(model: nn.Module, inputs: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, task: Task) -> None:
    """Take one step of the optimizer on a batch."""
    # torch's fused attention takes six times as long as this, in bfloat16, on the way back.
    with torch.autocast("cpu", torch.bfloat16), lstms_that_run(), sdpa_kernel(SDPBackend.MATH):
        error = loss(model, inputs, labels)
    optimizer.zero_grad()
    error.backward()
    if task.clip:
        nn.utils.clip_grad_norm_(model.parameters(), task.clip)
    optimizer.step()


def _scored(model: nn.Module, test: Examples, task: Task) -> dict[str, float]:
    return {task.measure: score(model, test, task.measure)}


def _pruner(
    model: nn.Module,
    row: Row,
    sparsity: float,
    seed: int,
    optimizer: torch.optim.Optimizer,
    n_batches: int,
    train: Examples,
    task: Task,
) -> sparsify.Pruner:
    """Convert the model and follow the row's recipe."""
    sparsify.convert(model, types=task.types)
    inputs, labels = next(batches(train, SNIP_BATCH, seed))

    return sparsify.Pruner(
        model,
        _recipe(row, sparsity, seed, task.epochs),
        optimizer=optimizer,
        steps_per_epoch=n_batches,
        total_steps=task.epochs * n_batches,
        loss=(lambda: loss(model, inputs, labels)) if row.recipe in ("snip", "grasp") else None,
    )


def _recipe(row: Row, sparsity: float, seed: int, epochs: int) -> sparsify.Recipe:
    """Load the row's recipe, for all layers."""
    variables = {"sparsity": sparsity, **row.scaled(epochs)}
    if row.recipe in ("rigl", "set", "static-random"):
        variables["seed"] = seed
    return sparsify.load_recipe(RECIPES / f"{row.recipe}.yaml", **variables)


def _counted(model: nn.Module) -> dict[str, Any]:
    """Count the weights of the converted layers, the fraction of zeros in them, and the parameters of the model."""
    weights = [layer.masked_weight() for layer in model.modules() if isinstance(layer, MaskedLayer)]
    n_weights = sum(weight.numel() for weight in weights)
    zeros = sum(int((weight == 0).sum()) for weight in weights) / n_weights
    return {"weights": n_weights, "zeros": zeros, "parameters": sum(p.numel() for p in model.parameters())}

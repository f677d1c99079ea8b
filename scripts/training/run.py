"""One training run: model, recipe, optimizer, 20 epochs, accuracy."""

import copy
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import sparsify
from sparsify.layers import MaskedLayer
from training.data import Examples, batches
from training.models import MODELS
from training.rows import EPOCHS, ROWS, SPARSITIES, Row

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
BATCH = 128
SNIP_BATCH = 1024
#: Optimizer of each model, with the learning rate that a cosine takes to 0.
OPTIMIZERS: dict[str, tuple[Any, dict[str, float]]] = {
    "mlp": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}),
    "vit": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05}),
}


def run(
    row: str, sparsity: float, seed: int, data: tuple[Examples, Examples], model_name: str = "mlp"
) -> list[dict[str, Any]]:
    """Train one row; returns its result, and after the dense model the results of the rows that prune it trained."""
    chosen, began = ROWS[row], time.time()
    torch.manual_seed(seed)
    model = MODELS[model_name]()
    train, test = data
    optimizer_type, options = OPTIMIZERS[model_name]
    optimizer = optimizer_type(model.parameters(), **options)
    n_batches = -(-len(train[1]) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * n_batches)
    pruner = (
        None if chosen is None or chosen.after else _pruner(model, chosen, sparsity, seed, optimizer, n_batches, train)
    )
    for epoch in tqdm(range(EPOCHS), desc=f"{model_name}, {row}, {sparsity:g}, seed {seed}", disable=None):
        model.train()
        for images, labels in batches(train, BATCH, seed * 1000 + epoch):
            # torch's fused attention takes six times as long as this, in bfloat16, on the way back.
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if pruner is not None:
                pruner.step()
        if pruner is not None:
            pruner.end_epoch()
    if pruner is not None:
        pruner.finish()
    facts = {"model": model_name, "seed": seed, "epochs": EPOCHS, "train_s": round(time.time() - began, 1)}
    facts["torch"] = torch.__version__
    if chosen is not None and not chosen.after:
        return [{"row": row, "sparsity": sparsity, **_counted(model), "accuracy": accuracy(model, test), **facts}]
    found = [{"row": "dense", "sparsity": 0.0, "zeros": 0.0, "accuracy": accuracy(model, test), **facts}]
    for name, other in ROWS.items():
        for target in SPARSITIES if other is not None and other.after else ():
            assert other is not None
            pruned = sparsify.apply(sparsify.convert(copy.deepcopy(model)), _recipe(other, target, seed))
            right = accuracy(pruned, test)
            found.append({"row": name, "sparsity": target, **_counted(pruned), "accuracy": right, **facts})
    return found


def accuracy(model: nn.Module, test: Examples) -> float:
    """Return the fraction of test images classified right, in float32."""
    model.eval()
    with torch.inference_mode():
        right = [int((model(x).argmax(1) == y).sum()) for x, y in zip(*(t.split(1000) for t in test), strict=True)]
    return sum(right) / len(test[1])


def _pruner(
    model: nn.Module,
    row: Row,
    sparsity: float,
    seed: int,
    optimizer: torch.optim.Optimizer,
    n_batches: int,
    train: Examples,
) -> sparsify.Pruner:
    """Convert the model and follow the row's recipe."""
    sparsify.convert(model)
    images, labels = next(batches(train, SNIP_BATCH, seed))

    def loss() -> Tensor:
        return F.cross_entropy(model(images), labels)

    return sparsify.Pruner(
        model,
        _recipe(row, sparsity, seed),
        optimizer=optimizer,
        steps_per_epoch=n_batches,
        total_steps=EPOCHS * n_batches,
        loss=loss if row.recipe in ("snip", "grasp") else None,
    )


def _recipe(row: Row, sparsity: float, seed: int) -> sparsify.Recipe:
    """Load the row's recipe, for all layers."""
    variables = {"sparsity": sparsity, **row.variables}
    if row.recipe in ("rigl", "set", "static-random"):
        variables["seed"] = seed
    return sparsify.load_recipe(RECIPES / f"{row.recipe}.yaml", **variables)


def _counted(model: nn.Module) -> dict[str, Any]:
    """Count the weights under the recipe, and the fraction of zeros in them."""
    weights = [layer.masked_weight() for layer in model.modules() if isinstance(layer, MaskedLayer)]
    n_weights = sum(weight.numel() for weight in weights)
    return {"weights": n_weights, "zeros": sum(int((weight == 0).sum()) for weight in weights) / n_weights}

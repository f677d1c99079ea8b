"""Prune a PyTorch model, export it to sparse layers, save it small, run it fast.

model = sparsify.convert(model)                      # every nn.Linear -> SparseLinear, outputs unchanged
sparsify.prune(model, 0.9)                           # masks; or sparsify.apply(model, recipe), or a Pruner while
training fast = sparsify.export(model)                        # SparseLinear -> CSRLinear
sparsify.save(fast, "model.safetensors")
fast = sparsify.load("model.safetensors", MyModel()) # onto a fresh dense model
"""

from sparsify.checkpoint import load, save
from sparsify.convert import convert, masks_from_zeros, to_dense
from sparsify.errors import (
    CheckpointError,
    LeftDenseWarning,
    MeasuredElsewhereWarning,
    RecipeError,
    RemovedLayerWarning,
    ScheduleWarning,
)
from sparsify.export import export
from sparsify.inspection import inspect
from sparsify.layers import CSRConv2d, CSRLinear, SparseConv2d, SparseLinear
from sparsify.prune import prune
from sparsify.pruner import Pruner
from sparsify.recipe import Recipe, apply, load_recipe
from sparsify.recover import recover
from sparsify.report import report
from sparsify.schedules import Schedule

__all__ = [
    "CSRConv2d",
    "CSRLinear",
    "CheckpointError",
    "LeftDenseWarning",
    "MeasuredElsewhereWarning",
    "Pruner",
    "Recipe",
    "RecipeError",
    "RemovedLayerWarning",
    "Schedule",
    "ScheduleWarning",
    "SparseConv2d",
    "SparseLinear",
    "apply",
    "convert",
    "export",
    "inspect",
    "load",
    "load_recipe",
    "masks_from_zeros",
    "prune",
    "recover",
    "report",
    "save",
    "to_dense",
]

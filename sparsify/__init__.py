"""Prune a PyTorch model, export it to sparse layers, save it small, run it fast.

model = sparsify.convert(model)                      # every nn.Linear -> SparseLinear, outputs unchanged
sparsify.prune(model, 0.9)                           # masks; or sparsify.apply(model, recipe), or a Pruner while
training fast = sparsify.export(model)                        # SparseLinear -> CSRLinear
sparsify.save(fast, "model.safetensors")
fast = sparsify.load("model.safetensors", MyModel()) # onto a fresh dense model
"""

from sparsify.checkpoint.save_load import load, save
from sparsify.conversion.convert import convert, masks_from_zeros, to_dense
from sparsify.errors import (
    CheckpointError,
    LeftDenseWarning,
    MeasuredElsewhereWarning,
    PaddingWarning,
    RecipeError,
    RemovedLayerWarning,
    SavedParametrizedWarning,
    ScheduleWarning,
    StaleMaskWarning,
)
from sparsify.inference.export import export
from sparsify.layers import CSRConv2d, CSRLinear, SparseConv2d, SparseLinear
from sparsify.masking.schedules import Schedule
from sparsify.pruning.prune import prune
from sparsify.pruning.recover import recover
from sparsify.recipes.recipe import Recipe, apply, load_recipe
from sparsify.reporting.inspection import inspect
from sparsify.reporting.report import report
from sparsify.training.pruner import Pruner

__all__ = [
    "CSRConv2d",
    "CSRLinear",
    "CheckpointError",
    "LeftDenseWarning",
    "MeasuredElsewhereWarning",
    "PaddingWarning",
    "Pruner",
    "Recipe",
    "RecipeError",
    "RemovedLayerWarning",
    "SavedParametrizedWarning",
    "Schedule",
    "ScheduleWarning",
    "SparseConv2d",
    "SparseLinear",
    "StaleMaskWarning",
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

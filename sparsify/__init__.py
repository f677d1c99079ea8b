"""Prune a PyTorch model, export it to sparse layers, save it small, run it fast.

>>> model = sparsify.convert(nn.Sequential(nn.Linear(64, 10)))  # each nn.Linear becomes a SparseLinear
>>> model = sparsify.prune(model, 0.9)  # or sparsify.apply(model, recipe), or a Pruner while training
>>> sparsify.save(sparsify.export(model, format="csr"), tmp_path / "model.safetensors")
>>> sparsify.load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(64, 10)))  # onto a new dense model
Sequential(
  (0): CSRLinear(in_features=64, out_features=10, bias=True, sparsity=0.9)
)
"""

from sparsify.calibration.generated import generate_data
from sparsify.calibration.sources import mix_data
from sparsify.checkpoint.save_load import load, save
from sparsify.conversion.convert import convert, masks_from_zeros, to_dense
from sparsify.deployment.native import native_paths
from sparsify.deployment.onnx_export import export_onnx
from sparsify.errors import (
    CarryOverWarning,
    CheckpointError,
    DefaultTypesWarning,
    LeftDenseWarning,
    MeasuredElsewhereWarning,
    PaddingWarning,
    RecipeError,
    RemovedLayerWarning,
    SavedParametrizedWarning,
    ScheduleWarning,
    SlowBfloat16Warning,
    StaleMaskWarning,
    UnseenExpertsWarning,
)
from sparsify.inference.export import export
from sparsify.integrations.on_import import register_all as _register_all
from sparsify.integrations.pretrained import from_pretrained, save_pretrained
from sparsify.integrations.sparsify_config import SparsifyConfig
from sparsify.layers import CSRConv2d, CSRLinear, SparseConv2d, SparseLinear
from sparsify.masking.schedules import Schedule
from sparsify.pruning.prune import prune
from sparsify.pruning.reconstruct import Reconstruction
from sparsify.pruning.recover import recover
from sparsify.recipes.apply import apply
from sparsify.recipes.compress import compress
from sparsify.recipes.loading import load_recipe
from sparsify.recipes.schema import Recipe
from sparsify.reporting.carry_over import carry_over
from sparsify.reporting.inspection import inspect
from sparsify.reporting.report import report
from sparsify.training.pruner import Pruner

__version__ = "0.1.0"

__all__ = [
    "CSRConv2d",
    "CSRLinear",
    "CarryOverWarning",
    "CheckpointError",
    "DefaultTypesWarning",
    "LeftDenseWarning",
    "MeasuredElsewhereWarning",
    "PaddingWarning",
    "Pruner",
    "Recipe",
    "RecipeError",
    "Reconstruction",
    "RemovedLayerWarning",
    "SavedParametrizedWarning",
    "Schedule",
    "ScheduleWarning",
    "SlowBfloat16Warning",
    "SparseConv2d",
    "SparseLinear",
    "SparsifyConfig",
    "StaleMaskWarning",
    "UnseenExpertsWarning",
    "apply",
    "carry_over",
    "compress",
    "convert",
    "export",
    "export_onnx",
    "from_pretrained",
    "generate_data",
    "inspect",
    "load",
    "load_recipe",
    "masks_from_zeros",
    "mix_data",
    "native_paths",
    "prune",
    "recover",
    "report",
    "save",
    "save_pretrained",
    "to_dense",
]

_register_all()

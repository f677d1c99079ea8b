"""Parts of commands: pruning layer by layer, so that a run can be resumed, and evaluation."""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.calibration.data_parallel import barrier, is_rank_zero
from sparsify.checkpoint.save_load import save
from sparsify.cli.models import build_empty
from sparsify.cli.user_code import load_function
from sparsify.conversion.convert import convert
from sparsify.inference.export import export
from sparsify.offload.disk_offload import LazySafetensors, named_tensors
from sparsify.offload.fingerprints import data_fingerprint, structure_fingerprint, tensors_fingerprint
from sparsify.offload.journal import Journal, check_unused
from sparsify.offload.streaming import (
    CACHE_BYTES,
    least_bytes,
    offloaded,
    prune_from_disk,
    prune_resumably,
    write_from_disk,
)
from sparsify.outputs import check_space
from sparsify.pruning.recover import recover
from sparsify.recipes.apply import recipe_layer_specs
from sparsify.recipes.assignment import assign_layers
from sparsify.recipes.schema import Recipe
from sparsify.reporting.report import Report, Row, report, table

Qualities = dict[str, float]

#: What became of the layers, and the model's qualities before and after, if they were asked for.
Compressed = tuple[Report, dict[str, Qualities]]


def compress_layer_by_layer(
    arguments: argparse.Namespace, recipe: Recipe, data: Sequence[Any], out: Path, model: nn.Module | None
) -> Compressed | None:
    """Compress so that it can be interrupted and go on; without a model in memory, with its weights on disk.

    Returns None in all processes of torchrun but the first.
    """
    folder = out.with_name(out.name + ".partial")
    if is_rank_zero():
        check_unused(folder, resume=arguments.resume)
    evaluate = evaluation(arguments.eval) if arguments.eval and is_rank_zero() else None
    weights = None
    if model is None:
        model, weights = _on_disk(arguments, recipe)
    about = _about(arguments, recipe, data, model)
    assign_layers(recipe, model)
    dense = dict(model.named_parameters(remove_duplicate=False))
    for group in recipe.groups:
        model = convert(model, include=group.layers, exclude=group.exclude, **conversion(arguments))
    if weights is not None:
        weights.rename(dense, model)
    tasks = recipe_layer_specs(recipe, model)
    check_space(out.parent, least_bytes(model, weights, tasks, folder), "--out ")
    about["weights"] = tensors_fingerprint(named_tensors(model, weights))
    journal = Journal(folder, about)
    if journal.result is not None:
        return _clean_up(journal, out) if is_rank_zero() else None
    quality: dict[str, Qualities] = {}
    if evaluate is not None:
        quality["dense"] = _evaluate(evaluate, model, weights, None)
    teacher = copy.deepcopy(model) if recipe.recover is not None and is_rank_zero() else None
    options: dict[str, Any] = {"cache_bytes": cache_of(arguments), "progress": not arguments.json and is_rank_zero()}
    if weights is None:
        prune_resumably(model, tasks, data, journal, **options)
    else:
        prune_from_disk(model, weights, tasks, data, journal, **options)
    barrier()
    if not is_rank_zero():
        return None
    if teacher is not None and recipe.recover is not None:
        recover(model, teacher, data, **recipe.recover.model_dump(), progress=not arguments.json)
    sizes = {"format": arguments.format, "tokens": arguments.tokens}
    if weights is None:
        model = export(model, copy=False, **sizes)
        save(model, out)
        found = report(model)
    else:
        found = write_from_disk(model, weights, journal, out, **sizes)
    if evaluate is not None:
        quality["sparse"] = _evaluate(evaluate, model, weights, journal)
    journal.conclude({"file": _state(out), "rows": [vars(row) for row in found], "quality": quality})
    journal.delete()
    return found, quality


def _on_disk(arguments: argparse.Namespace, recipe: Recipe) -> tuple[nn.Module, LazySafetensors]:
    """Build a model whose weights stay on disk."""
    if recipe.recover is not None:
        raise ValueError("recover trains the whole model at once and cannot --stream; leave one of them out")
    model, folder = build_empty(arguments.model)
    if (source := arguments.weights or folder) is None:
        raise ValueError(f"--stream: give the weights of {arguments.model!r} with --weights FILE.safetensors")
    return model, LazySafetensors(source)


def _about(arguments: argparse.Namespace, recipe: Recipe, data: Sequence[Any], model: nn.Module) -> dict[str, Any]:
    """Return what decides the result of a run but for the weights, by its content: a path may come to mean another."""
    source, _, folder = arguments.model.partition(":")
    name = "" if source == "hf" else f"{arguments.model} "
    about = {
        "sparsify": _version(),
        "torch": torch.__version__,
        "model": name + structure_fingerprint(model),
        "recipe": recipe.model_dump_json(exclude={"description", "vars"}),
        "data": data_fingerprint(data),
        **conversion(arguments),
    }
    if source == "hf":
        about["config.json"] = hashlib.sha256((Path(folder) / "config.json").read_bytes()).hexdigest()
    return about


def _version() -> str:
    try:
        return version("sparsify-torch")
    except PackageNotFoundError:  # run from its folder
        return "unknown"


def _clean_up(journal: Journal, out: Path) -> Compressed:
    """End the clean-up of a run that was over, and return what it returned."""
    assert journal.result is not None
    if journal.result["file"] != _state(out):
        raise ValueError(f"{journal.folder}: of a run that is over, but {out} has changed since; delete the folder")
    rows = tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in journal.result["rows"])
    journal.delete()
    warnings.warn(f"{out} is complete; only the end of the clean-up was missing", stacklevel=2)
    return Report(rows), journal.result["quality"]


def _state(file: Path) -> list[int] | None:
    """Return what changes when a file is replaced or written to."""
    return [(found := file.stat()).st_size, found.st_mtime_ns] if file.exists() else None


def conversion(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line says of `convert`, but for the layers."""
    return {"tied": arguments.tied, "functional": arguments.functional}


def cache_of(arguments: argparse.Namespace) -> int:
    """Return how much of the data on its way through the model stays in memory."""
    return CACHE_BYTES if arguments.cache is None else int(arguments.cache * 1e9)


def _evaluate(
    evaluate: Callable[[nn.Module], Qualities],
    model: nn.Module,
    weights: LazySafetensors | None,
    journal: Journal | None,
) -> Qualities:
    """Evaluate a model, if need be with its weights on disk."""
    if weights is None:
        return evaluate(model)
    with offloaded(model, weights, journal) as running:
        found = evaluate(running)
    if lost := [key for key, value in found.items() if math.isnan(value)]:
        raise ValueError(
            f"--eval: {lost[0]!r} is NaN. With --stream a weight is in memory only while its own module runs, and "
            "elsewhere NaN: evaluate with calls of the model alone, or leave --eval out and evaluate the file"
        )
    return found


def evaluation(path: str) -> Callable[[nn.Module], Qualities]:
    """Return the user's function "module:function" as one from a model to its qualities by name."""
    function = load_function(path, f"--eval {path}")

    def evaluate(model: nn.Module) -> Qualities:
        with torch.inference_mode():
            found = function(model)
        try:
            named = found.items() if isinstance(found, dict) else [("quality", found)]
            return {str(key): float(value) for key, value in named}
        except (TypeError, ValueError):
            raise ValueError(f"--eval {path}: must return a number or a dict of numbers, got {found!r}") from None

    return evaluate


def quality_table(dense: Qualities, sparse: Qualities) -> str:
    """Lay out qualities before and after."""
    lines = [(key, f"{dense[key]:.4g}", f"{value:.4g}") for key, value in sparse.items() if key in dense]
    return table([("quality", "dense", "sparse"), *lines])

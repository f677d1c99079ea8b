"""sparsify compress --resume and --stream: a model pruned layer by layer, its finished layers in a journal."""

from __future__ import annotations

import argparse
import copy
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsify
from sparsify.calibration.data_parallel import barrier, is_rank_zero
from sparsify.checkpoint.save_load import save
from sparsify.cli.evaluation import Qualities, evaluate_offloaded, evaluation
from sparsify.cli.models import build_empty
from sparsify.cli.options import cache_of, conversion, form_of
from sparsify.cli.summary import Compressed, loading_lines
from sparsify.inference.export import export
from sparsify.offload.disk_offload import named_tensors
from sparsify.offload.fingerprints import data_fingerprint, structure_fingerprint, tensors_fingerprint
from sparsify.offload.journal import Journal, check_unused
from sparsify.offload.lazy_safetensors import LazySafetensors
from sparsify.offload.streaming import (
    least_bytes,
    prune_from_disk,
    prune_resumably,
    write_from_disk,
)
from sparsify.outputs import check_space
from sparsify.pruning.recover import recover
from sparsify.recipes.apply import recipe_layer_specs, recover_options
from sparsify.recipes.assignment import assign_layers, convert_by_recipe
from sparsify.recipes.schema import Recipe
from sparsify.reporting.report import Report, Row, report


def compress_layer_by_layer(
    arguments: argparse.Namespace, recipe: Recipe, data: Sequence[Any], out: Path, model: nn.Module | None
) -> Compressed | None:
    """Compress a model, or go on with an interrupted run; without a model in memory, with its weights on disk.

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
    loader = loading_lines(arguments.model, model, out)
    assign_layers(recipe, model)
    dense = dict(model.named_parameters(remove_duplicate=False))
    model = convert_by_recipe(model, recipe, **conversion(arguments))
    if weights is not None:
        weights.rename(dense, model)
    specs = recipe_layer_specs(recipe, model)
    quantized = form_of(arguments, recipe)["quantize"] is not None
    check_space(out.parent, least_bytes(model, weights, specs, folder, quantized=quantized), "--out ")
    about["weights"] = tensors_fingerprint(named_tensors(model, weights))
    journal = Journal(folder, about)
    if journal.result is not None:
        return _clean_up(journal, out, loader) if is_rank_zero() else None
    quality: dict[str, Qualities] = {}
    if evaluate is not None:
        quality["dense"] = evaluate_offloaded(evaluate, model, weights, None)
    teacher = copy.deepcopy(model) if recipe.recover is not None and is_rank_zero() else None
    options: dict[str, Any] = {"cache_bytes": cache_of(arguments), "progress": not arguments.json and is_rank_zero()}
    options["reconstruct"] = recipe.reconstruction
    if weights is None:
        prune_resumably(model, specs, data, journal, **options)
    else:
        prune_from_disk(model, weights, specs, data, journal, **options)
    barrier()
    if not is_rank_zero():
        return None
    if teacher is not None and recipe.recover is not None:
        options = recover_options(recipe, model) | {"cache_bytes": cache_of(arguments), "progress": not arguments.json}
        recover(model, teacher, data, **options)
    if weights is None:
        model = export(model, copy=False, **form_of(arguments, recipe, data))
        save(model, out)
        rows = report(model)
    else:
        form = form_of(arguments, recipe, data)
        options = {key: form[key] for key in ("format", "tokens", "quantize", "example")}
        rows = write_from_disk(model, weights, journal, out, **options)
    if evaluate is not None:
        quality["sparse"] = evaluate_offloaded(evaluate, model, weights, journal)
    journal.conclude({"file": _state(out), "rows": [vars(row) for row in rows], "quality": quality})
    journal.delete()
    return Compressed(rows, quality, loader)


def _on_disk(arguments: argparse.Namespace, recipe: Recipe) -> tuple[nn.Module, LazySafetensors]:
    """Build a model without weights in memory, and open its files."""
    if recipe.recover is not None:
        raise ValueError("recover trains the whole model at once and cannot --stream; leave one of them out")
    model, folder = build_empty(arguments.model)
    if (source := arguments.weights or folder) is None:
        raise ValueError(f"--stream: give the weights of {arguments.model!r} with --weights FILE.safetensors")
    return model, LazySafetensors(source)


def _about(arguments: argparse.Namespace, recipe: Recipe, data: Sequence[Any], model: nn.Module) -> dict[str, Any]:
    """Return all inputs of a run but the weights, by content: a path may come to mean another file."""
    source, _, folder = arguments.model.partition(":")
    name = "" if source == "hf" else f"{arguments.model} "
    about = {
        "sparsify": sparsify.__version__,
        "torch": torch.__version__,
        "model": name + structure_fingerprint(model),
        "recipe": recipe.model_dump_json(exclude={"description", "vars"}),
        "data": data_fingerprint(data),
        **conversion(arguments),
    }
    if source == "hf":
        about["config.json"] = hashlib.sha256((Path(folder) / "config.json").read_bytes()).hexdigest()
    return about


def _clean_up(journal: Journal, out: Path, loader: tuple[str, ...]) -> Compressed:
    """End the clean-up of a finished run, and return its result."""
    assert journal.result is not None
    if journal.result["file"] != _state(out):
        raise ValueError(f"{journal.folder}: of a run that is over, but {out} has changed since; delete the folder")
    rows = tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in journal.result["rows"])
    journal.delete()
    warnings.warn(f"{out} is complete; only the end of the clean-up was missing", stacklevel=2)
    return Compressed(Report(rows), journal.result["quality"], loader)


def _state(file: Path) -> list[int] | None:
    """Return size and time of a file, to tell if it was replaced or written to."""
    return [(stat := file.stat()).st_size, stat.st_mtime_ns] if file.exists() else None

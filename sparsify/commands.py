"""Commands that take longer than a glance: pruning layer by layer, resumable, and measuring sensitivity."""

from __future__ import annotations

import argparse
import copy
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from sparsify.checkpoint import save
from sparsify.convert import convert
from sparsify.export import export
from sparsify.journal import Journal, fingerprint
from sparsify.models import build_empty, importable_from_here
from sparsify.recipe import Recipe, assign_layers, tasks_of
from sparsify.recover import recover
from sparsify.report import Report, report, table
from sparsify.resident import Weights
from sparsify.sensitivity import Sensitivity, draw, measure_sensitivity
from sparsify.stream import CACHE_BYTES, prune_from_disk, prune_resumably

Qualities = dict[str, float]


def compress_layer_by_layer(
    arguments: argparse.Namespace, recipe: Recipe, data: Sequence[Any], out: Path, model: nn.Module | None
) -> Report:
    """Compress so that it can be interrupted and go on; without a model in memory, with its weights on disk."""
    if model is None and recipe.recover is not None:
        raise ValueError("recover trains the whole model at once and cannot --stream; leave one of them out")
    folder = out.with_name(out.name + ".partial")
    if folder.exists() and not arguments.resume:
        raise ValueError(f"{folder} is what an interrupted run has finished; go on with --resume, or delete it")
    source: Any = None
    if model is None:
        model, source = build_empty(arguments.model)
        source = arguments.weights or source
        if source is None:
            raise ValueError(f"--stream: give the weights of {arguments.model!r} with --weights FILE.safetensors")
    assign_layers(recipe, model)
    for group in recipe.groups:
        model = convert(model, include=group.layers, exclude=group.exclude)
    tasks = tasks_of(recipe, model)
    about = {
        "model": arguments.model,
        "weights": str(arguments.weights),
        "recipe": recipe.model_dump_json(exclude={"description", "vars"}),
        "data": fingerprint(data),
    }
    cache_bytes = CACHE_BYTES if arguments.cache is None else int(arguments.cache * 1e9)
    sizes = {"format": arguments.format, "tokens": arguments.tokens}
    progress = not arguments.json
    if source is not None:
        weights, journal = Weights(source), Journal(folder, about)
        found = prune_from_disk(
            model, weights, tasks, data, out, journal, **sizes, cache_bytes=cache_bytes, progress=progress
        )
    else:
        journal = Journal(folder, about)
        teacher = copy.deepcopy(model) if recipe.recover else None
        prune_resumably(model, tasks, data, journal, cache_bytes=cache_bytes, progress=progress)
        if recipe.recover is not None and teacher is not None:
            recover(model, teacher, data, **recipe.recover.model_dump(), progress=progress)
        fast = export(model, **sizes)
        save(fast, out)
        found = report(fast)
    journal.delete()
    return found


def measure(arguments: argparse.Namespace, model: nn.Module, data: Any) -> tuple[Sensitivity, dict[str, float]]:
    """Measure a model's sensitivity; draw it and write a recipe if asked for. Returns also the budget's allocation."""
    if (arguments.target is None) != (arguments.recipe is None):
        raise ValueError("--target and --recipe go together: the budget, and the file to write")
    converted = convert(model, include=arguments.include, exclude=arguments.exclude)
    measured = measure_sensitivity(
        converted,
        data,
        sparsities=arguments.sparsities,
        method=arguments.method,
        refit=arguments.refit,
        progress=not arguments.json,
    )
    if arguments.picture:
        draw(measured, arguments.picture)
    if arguments.target is None:
        return measured, {}
    targets = measured.allocate(arguments.target, max_sparsity=arguments.max_sparsity)
    group: dict[str, Any] = {"layers": list(targets), "method": arguments.method, "allocation": targets}
    if arguments.refit:
        group["refit"] = True
    text = f"{arguments.target:g} of all weights removed where that costs least, as measured on {arguments.model}."
    content = {"version": 1, "description": text, "groups": [group]}
    Path(arguments.recipe).write_text(yaml.safe_dump(content, sort_keys=False, width=120))
    return measured, targets


def sensitivity_table(measured: Sensitivity, targets: dict[str, float]) -> str:
    """Lay out the damage of each layer at each sparsity, and its target."""
    lines = [["layer", *(f"{s:g}" for s in measured.sparsities), *(["target"] if targets else [])]]
    for name, damage in measured.damage.items():
        lines.append([name or "(root)", *(f"{d:.4f}" for d in damage)] + ([f"{targets[name]:.4f}"] if targets else []))
    return table(lines)


def evaluation(path: str) -> Callable[[nn.Module], Qualities]:
    """Return the user's function "module:function" as one from a model to its qualities by name."""
    module, _, name = path.partition(":")
    try:
        with importable_from_here():
            function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--eval {path}: {error}; write module:function, importable from here") from error

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

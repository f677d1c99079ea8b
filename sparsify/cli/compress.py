"""sparsify compress: build a model, prune it, export it, and save it to one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sparsify
from sparsify.calibration.data_parallel import all_ranks_equal, is_rank_zero, process_group
from sparsify.cli.evaluation import Qualities, evaluation, quality_table
from sparsify.cli.files import check_output
from sparsify.cli.layer_by_layer import Compressed, compress_layer_by_layer
from sparsify.cli.options import cache_of, conversion, data_of, form_of, model_of, naming, recipe_of
from sparsify.cli.printing import print_json, rows
from sparsify.inference.export import check_format
from sparsify.offload.fingerprints import data_fingerprint
from sparsify.outputs import check_space
from sparsify.recipes.apply import check_applicable
from sparsify.recipes.assignment import assign_layers, convert_by_recipe
from sparsify.recipes.dry_run import file_bytes
from sparsify.recipes.schema import Recipe
from sparsify.reporting.report import Report

_MAX_CACHE_GB, _MAX_TOKENS = 1e6, 2**20


def compress(arguments: argparse.Namespace) -> None:
    """Build a model, prune it, export it, and save it; then print the layers in the file.

    Under torchrun the processes share the calibration data, and the first one does the rest.
    """
    recipe = recipe_of(arguments)
    _check_options(arguments, recipe)
    by_layer = arguments.stream or arguments.resume
    data = data_of(arguments)
    with naming(arguments.recipe):
        check_applicable(recipe, has_data=data is not None)
    with process_group():
        if data is not None:
            data = list(data)
            if not all_ranks_equal(int(data_fingerprint(data)[:15], 16)):
                raise ValueError("--data: not the same batches in every process; draw them with a fixed seed")
        out = Path(arguments.out)
        done = (_compress_layer_by_layer if by_layer else _compress_in_memory)(arguments, recipe, data, out)
    if done is not None:
        _print_result(arguments, out, *done)


def _check_options(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Check before anything is read all options that would fail after the work."""
    quantize = form_of(arguments, recipe)["quantize"]
    check_format(arguments.format, arguments.tokens, torch.device("cpu"), quantize)
    if arguments.quantize_rest and quantize is None:
        raise ValueError("--quantize-rest has no effect without --quantize")
    if quantize is not None and arguments.stream:
        raise ValueError(
            "int8 needs the model in memory, which --stream does without; leave out --quantize, load the file, and "
            "save sparsify.export(model, quantize='int8')"
        )
    if arguments.tokens is not None and arguments.tokens > _MAX_TOKENS:
        raise ValueError(f"--tokens must be at most {_MAX_TOKENS}, got {arguments.tokens}")
    if arguments.cache is not None and arguments.data is None:
        raise ValueError("--cache has no effect without --data")
    if arguments.cache is not None and not 0 <= arguments.cache <= _MAX_CACHE_GB:
        raise ValueError(f"--cache is a number of GB, got {arguments.cache}")
    if arguments.data is None and (arguments.stream or arguments.resume):
        raise ValueError("--stream and --resume are for pruning on calibration data; give --data")
    check_output(arguments, "out", reads=("weights", "data", "recipe"))


def _compress_in_memory(arguments: argparse.Namespace, recipe: Recipe, data: Any, out: Path) -> Compressed | None:
    """Compress a model in one go."""
    quiet = arguments.json or not is_rank_zero()
    evaluate = evaluation(arguments.eval) if arguments.eval and is_rank_zero() else None
    quality: dict[str, Qualities] = {}
    with tqdm(total=5, desc="build the model", bar_format="{desc:<28}{bar}| {n_fmt}/{total_fmt}", disable=quiet) as bar:
        model = model_of(arguments)
        with naming(arguments.recipe):
            assign_layers(recipe, model)
        if evaluate:
            quality["dense"] = evaluate(model)
        _advance(bar, "convert its layers")
        model = convert_by_recipe(model, recipe, **conversion(arguments))
        if data is not None:  # without, all of the work is the writing
            check_space(out.absolute().parent, file_bytes(recipe, model), f"--out {out}: ")
        _advance(bar, "prune")
        if not is_rank_zero():  # rank zero alone recovers
            recipe = recipe.model_copy(update={"recover": None})
        with naming(arguments.recipe):
            cache_bytes = None if data is None else cache_of(arguments)
            sparsify.apply(model, recipe, data=data, cache_bytes=cache_bytes, progress=not quiet)
        if not is_rank_zero():
            return None
        _advance(bar, "export")
        fast = sparsify.export(model, copy=False, **form_of(arguments, recipe, data))
        _advance(bar, f"save {out.name}")
        sparsify.save(fast, out)
        if evaluate:
            quality["sparse"] = evaluate(fast)
        _advance(bar, "done")
    return sparsify.report(fast), quality


def _compress_layer_by_layer(arguments: argparse.Namespace, recipe: Recipe, data: Any, out: Path) -> Compressed | None:
    """Compress a model so as to go on after an interruption, with the weights on disk for --stream."""
    model = None if arguments.stream else model_of(arguments)
    with naming(arguments.recipe):
        return compress_layer_by_layer(arguments, recipe, data, out, model)


def _print_result(arguments: argparse.Namespace, out: Path, report: Report, quality: dict[str, Qualities]) -> None:
    """Print the layers, and the model's quality before and after."""
    n_bytes = out.stat().st_size
    if arguments.json:
        result: dict[str, Any] = {"file": str(out), "file_bytes": n_bytes}
        if arguments.stream:  # the model is nowhere in memory, and its file may not fit
            result["in_file"] = rows(report)
        else:
            result |= {"in_memory": rows(report), "in_file": rows(sparsify.inspect(out))}
        print_json(result | ({"quality": quality} if quality else {}))
        return
    print(report)
    if quality:
        print(f"\n{quality_table(**quality)}")
    print(f"\n{out}: {n_bytes:,} bytes")
    print(f"next: sparsify inspect {out}")
    print(f"      python: model = sparsify.load({str(out)!r}, the_dense_model)")


def _advance(bar: Any, text: str) -> None:
    bar.update(1)
    bar.set_description(text)

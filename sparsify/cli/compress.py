"""sparsify compress: build a model, prune it, export it, and save it to one file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import sparsify
from sparsify.calibration.data_parallel import all_ranks_equal, is_rank_zero, process_group
from sparsify.cli.evaluation import Qualities, evaluation
from sparsify.cli.files import check_output
from sparsify.cli.layer_by_layer import compress_layer_by_layer
from sparsify.cli.options import (
    cache_of,
    conversion,
    data_of,
    form_of,
    given_inputs,
    model_of,
    naming,
    other_data_of,
    recipe_of,
)
from sparsify.cli.pages import write_page_of_run
from sparsify.cli.printing import print_json, rows, show
from sparsify.cli.quality import DataQuality
from sparsify.cli.summary import Compressed, dense_bytes, inputs_to_time, loading_lines
from sparsify.inference.export import check_format
from sparsify.offload.fingerprints import data_fingerprint
from sparsify.outputs import check_space
from sparsify.recipes.apply import check_applicable
from sparsify.recipes.assignment import assign_layers, convert_by_recipe
from sparsify.recipes.dry_run import file_bytes
from sparsify.recipes.schema import Recipe
from sparsify.reporting.model_run import Inputs
from sparsify.reporting.model_speed import model_speed

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
        if arguments.report:
            write_page_of_run(arguments.report, out, recipe, done)
        _print_result(arguments, out, done)


def _check_options(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Check before anything is read all options that would fail after the work."""
    quantize = form_of(arguments, recipe)["quantize"]
    check_format(arguments.format, arguments.tokens, torch.device("cpu"), quantize)
    if arguments.quantize_rest and quantize is None:
        raise ValueError("--quantize-rest has no effect without --quantize")
    if arguments.quantize_rest and arguments.stream:
        raise ValueError(
            "--quantize-rest needs the model in memory, which --stream does without; leave it out, or load the file "
            "and save sparsify.export(model, quantize='int8', quantize_rest=True)"
        )
    if arguments.tokens is not None and arguments.tokens > _MAX_TOKENS:
        raise ValueError(f"--tokens must be at most {_MAX_TOKENS}, got {arguments.tokens}")
    if arguments.cache is not None and arguments.data is None:
        raise ValueError("--cache has no effect without --data")
    if arguments.cache is not None and not 0 <= arguments.cache <= _MAX_CACHE_GB:
        raise ValueError(f"--cache is a number of GB, got {arguments.cache}")
    if arguments.data is None and (arguments.stream or arguments.resume):
        raise ValueError("--stream and --resume are for pruning on calibration data; give --data")
    if arguments.check is not None and (arguments.stream or arguments.resume):
        raise ValueError("--check compares with the dense model in memory; leave out --stream and --resume")
    if (arguments.stream or arguments.resume) and given_inputs(arguments):
        raise ValueError("--batch, --seq, --shape and --inputs are for timing, and --stream and --resume time nothing")
    check_output(arguments, "out", reads=("weights", "data", "recipe"))
    if arguments.report:
        check_output(arguments, "report", reads=("weights", "data", "recipe"))
        if os.path.realpath(arguments.report) == os.path.realpath(arguments.out):
            raise ValueError(f"--report and --out are the same file, {arguments.out}")


def _compress_in_memory(arguments: argparse.Namespace, recipe: Recipe, data: Any, out: Path) -> Compressed | None:
    """Compress a model in one go."""
    quiet = arguments.json or not is_rank_zero()
    before = _Before()
    bar_format = "{desc:<28}{bar}| {n_fmt}/{total_fmt}"
    with tqdm(total=6, desc="build the model", bar_format=bar_format, disable=quiet or None) as bar:
        model = model_of(arguments)
        with naming(arguments.recipe):
            assign_layers(recipe, model)
        if is_rank_zero():
            before = _Before.of(arguments, model, data)
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
        fast = sparsify.export(model, copy=False, **form_of(arguments, recipe, data, before.inputs))
        _advance(bar, f"save {out.name}")
        sparsify.save(fast, out)
        _advance(bar, "measure the model")
        done = before.compare(fast, loading_lines(arguments.model, model, out))
        _advance(bar, "done")
    return done


@dataclass(frozen=True)
class _Before:
    """The facts about a dense model to compare with: quality, size, and inputs to time it on."""

    quality: Qualities = field(default_factory=dict)
    evaluate: Callable[[nn.Module], Qualities] | None = None
    on_data: DataQuality | None = None
    n_bytes: int | None = None
    inputs: Inputs | None = None
    about_inputs: str = ""

    @classmethod
    def of(cls, arguments: argparse.Namespace, model: nn.Module, data: Any) -> _Before:
        """Measure a dense model."""
        evaluate = evaluation(arguments.eval) if arguments.eval else None
        inputs, about = inputs_to_time(arguments, model)
        others = other_data_of(arguments)
        on_data = DataQuality(model, data, others) if data and (others or not evaluate) else None
        quality = {**(evaluate(model) if evaluate else {}), **(on_data.of_dense if on_data else {})}
        return cls(quality, evaluate, on_data, dense_bytes(model), inputs, about)

    def compare(self, fast: nn.Module, loader: tuple[str, ...]) -> Compressed:
        """Measure the exported model."""
        after = {
            **(self.evaluate(fast) if self.evaluate else {}),
            **(self.on_data.of(fast) if self.on_data else {}),
        }
        quality = {"dense": self.quality, "sparse": after} if after else {}
        speed = None if self.inputs is None else model_speed(fast, self.inputs)
        why = self.about_inputs if speed is None else ""
        return Compressed(
            sparsify.report(fast, self.inputs), quality, loader, self.n_bytes, speed, self.about_inputs, why
        )


def _compress_layer_by_layer(arguments: argparse.Namespace, recipe: Recipe, data: Any, out: Path) -> Compressed | None:
    """Compress a model so as to go on after an interruption, with the weights on disk for --stream."""
    model = None if arguments.stream else model_of(arguments)
    with naming(arguments.recipe):
        return compress_layer_by_layer(arguments, recipe, data, out, model)


def _print_result(arguments: argparse.Namespace, out: Path, done: Compressed) -> None:
    """Print the layers, and what became of the model."""
    if arguments.json:
        result: dict[str, Any] = {"file": str(out), "file_bytes": out.stat().st_size}
        if arguments.stream:  # the model is nowhere in memory, and its file may not fit
            result["in_file"] = rows(done.report)
        else:
            result |= {"in_memory": rows(done.report), "in_file": rows(sparsify.inspect(out))}
        print_json(result | done.as_json())
        return
    show(done.report.listing())
    print(f"\n{done.text(out)}")


def _advance(bar: Any, text: str) -> None:
    bar.update(1)
    bar.set_description(text)

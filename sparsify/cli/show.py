"""The commands without an output file: inspect, plan, bench, doctor, native, schema."""

from __future__ import annotations

import argparse
import dataclasses
import os

import torch

import sparsify
from sparsify.cli.models import build_model
from sparsify.cli.options import conversion, given_inputs, inputs_of, model_of, naming, variables
from sparsify.cli.printing import print_json, rows, show
from sparsify.deployment.native import native_paths
from sparsify.hardware.machine import doctor
from sparsify.recipes.dry_run import plan
from sparsify.recipes.loading import load_recipe
from sparsify.recipes.schema import Recipe
from sparsify.reporting.model_bench import bench

_MAX_THREADS = 1024


def inspect(arguments: argparse.Namespace) -> None:
    """List the layers in a file, or the effect of convert on a model.

    A model may be named in the place of the file, but then nothing is imported from the present folder.
    """
    what, spec = arguments.what, arguments.model
    if (what is None) == (spec is None):
        raise ValueError("give either a file or a model: sparsify inspect FILE, or sparsify inspect --model MODEL")
    if what is not None and _is_file(what):
        _inspect_file(arguments)
        return
    model = build_model(what or spec, here=what is None)
    example = None
    if arguments.once:
        example = inputs_of(arguments, model, what or spec)
    elif given_inputs(arguments):
        raise ValueError("--batch, --seq, --shape and --inputs have no effect without --run")
    inspection = sparsify.inspect(model, example)
    if not arguments.json:
        show(inspection.listing())
        return
    print_json({"model": what or spec, **dataclasses.asdict(inspection)})


def _is_file(what: str) -> bool:
    """Return whether a name means a file: an existing one, or a name in no form of a model's."""
    source, colon, _ = what.partition(":")
    return os.path.lexists(what) or not colon or os.sep in source


def _inspect_file(arguments: argparse.Namespace) -> None:
    if arguments.once or given_inputs(arguments):
        raise ValueError(f"{arguments.what} is a file; --run and the options of its inputs are for models")
    report = sparsify.inspect(arguments.what)
    n_bytes = os.path.getsize(arguments.what)
    if arguments.json:
        print_json({"file": arguments.what, "file_bytes": n_bytes, "in_file": rows(report)})
        return
    size = f"{arguments.what}: {n_bytes:,} bytes, {n_bytes - report.total.n_bytes:,} of it other tensors and header"
    show(report.listing(), size)


def plan_recipe(arguments: argparse.Namespace) -> None:
    """Print every layer of a recipe, its target at each update, and its size at the end."""
    recipe = load_recipe(arguments.recipe, **variables(arguments.set))
    model = model_of(arguments)
    with naming(arguments.recipe):
        layers = plan(recipe, model)
    if arguments.json:
        keys = ("name", "group", "shape", "unit", "targets", "ranked", "n_bytes", "dense_bytes")
        print_json(
            {
                "layers": [{key: getattr(layer, key) for key in keys} for layer in layers],
                "n_bytes": layers.n_bytes,
                "dense_bytes": layers.dense_bytes,
            }
        )
        return
    show(layers.listing())


def bench_model(arguments: argparse.Namespace) -> None:
    """Time the dense model and its pruned and exported copy, in turns."""
    if not 0 <= arguments.sparsity <= 1:
        raise ValueError(f"--sparsity must be between 0 and 1, got {arguments.sparsity}")
    if arguments.threads is not None:
        if not 1 <= arguments.threads <= _MAX_THREADS:
            raise ValueError(f"--threads must be at least 1 and at most {_MAX_THREADS}, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    model = model_of(arguments)
    inputs = inputs_of(arguments, model, arguments.model)
    result = bench(model, inputs, arguments.sparsity, engines=not arguments.torch_only, **conversion(arguments))
    if arguments.json:
        print_json({**dataclasses.asdict(result), "speedup": result.speedup})
        return
    show(result.listing())


def schema(arguments: argparse.Namespace) -> None:
    """Print the JSON schema of recipes, for editors."""
    print_json(Recipe.model_json_schema())


def run_doctor(arguments: argparse.Namespace) -> None:
    """Print the facts about this machine that decide the speed of exported layers."""
    findings = doctor()
    if arguments.json:
        print_json([dict(zip(("what", "found", "do"), row, strict=True)) for row in findings])
        return
    for what, found, to_do in findings:
        print(f"{what + ':':16}{found}" + (f"\n{'':16}-> {to_do}" if to_do else ""))


def print_native_paths(arguments: argparse.Namespace) -> None:
    """Print the places of the C library, or one of them."""
    paths = native_paths()
    if arguments.place:
        print(getattr(paths, arguments.place))
        return
    for name, place in paths._asdict().items():
        print(f"{name + ':':16}{place}")

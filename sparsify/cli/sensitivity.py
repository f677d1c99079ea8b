"""sparsify sensitivity: measure the damage of pruning each layer, draw it, and write a recipe for a budget."""

from __future__ import annotations

import argparse
from typing import Any

import yaml
from torch import nn

from sparsify.cli.files import check_output
from sparsify.cli.options import conversion, data_of, model_of
from sparsify.cli.printing import print_json, show
from sparsify.conversion.convert import convert, sparse_layers
from sparsify.conversion.converters.table import dense_types
from sparsify.masking.methods.registry import required_statistics
from sparsify.masking.patterns import parse_pattern
from sparsify.outputs import write_text
from sparsify.pruning.sensitivity import (
    Sensitivity,
    check_picture,
    check_sparsities,
    measure_sensitivity,
    plot_sensitivity,
)


def sensitivity(arguments: argparse.Namespace) -> None:
    """Measure the change of the model's output with each layer alone pruned, and write a recipe for a budget."""
    _check_options(arguments)
    data = data_of(arguments)
    types = None if arguments.types is None else dense_types(arguments.types)
    model = convert(
        model_of(arguments), include=arguments.include, exclude=arguments.exclude, types=types, **conversion(arguments)
    )
    _check_budget(arguments, model)
    measured = measure_sensitivity(
        model,
        data,
        sparsities=arguments.sparsities,
        method=arguments.method,
        pattern=arguments.pattern,
        refit=arguments.refit,
        progress=not arguments.json,
    )
    targets = {}
    if arguments.target is not None:
        targets = measured.allocate(arguments.target, max_sparsity=arguments.max_sparsity)
    _print_result(arguments, measured, targets)  # first, so that a full disk loses no table
    if arguments.picture:
        title = f"{arguments.model}, {arguments.method}"
        plot_sensitivity(measured, arguments.picture, targets=targets, title=title)
    if arguments.recipe:
        write_text(arguments.recipe, _recipe(arguments, targets), "--recipe ")


def _check_options(arguments: argparse.Namespace) -> None:
    """Check before anything is read all options that would fail after the measurement."""
    if arguments.data is None:
        raise ValueError("give calibration data with --data: texts, pictures, or package.module:function")
    if (arguments.target is None) != (arguments.recipe is None):
        raise ValueError("--target and --recipe go together: the budget, and the file to write")
    check_sparsities(arguments.sparsities, parse_pattern(arguments.pattern))
    if required_statistics(arguments.method):
        raise ValueError(f"method {arguments.method!r} looks at a training, and nothing is trained here")
    if arguments.recipe:
        check_output(arguments, "recipe")
    if arguments.picture:
        check_picture(arguments.picture)
        check_output(arguments, "picture")
    if arguments.recipe and arguments.recipe == arguments.picture:
        raise ValueError(f"--recipe and --picture are the same file, {arguments.recipe}")


def _check_budget(arguments: argparse.Namespace, model: nn.Module) -> None:
    """Raise ValueError for a target out of reach, whatever the damage will be."""
    if arguments.target is None:
        return
    pattern = parse_pattern(arguments.pattern)
    n_units = {name: pattern.n_units(layer.shape) for name, layer in sparse_layers(model).items()}
    harmless = dict.fromkeys(n_units, (0.0,) * len(arguments.sparsities))
    unmeasured = Sensitivity(tuple(arguments.sparsities), harmless, n_units)
    unmeasured.allocate(arguments.target, max_sparsity=arguments.max_sparsity)


def _print_result(arguments: argparse.Namespace, measured: Sensitivity, targets: dict[str, float]) -> None:
    """Print the damage of each layer at each sparsity, and its target."""
    if arguments.json:
        print_json({"sparsities": measured.sparsities, "damage": dict(measured.damage), "targets": targets})
        return
    show(measured.listing(targets))
    if arguments.recipe:
        print(f"\nnext: sparsify compress --model {arguments.model} --recipe {arguments.recipe} --data ... --out ...")


def _recipe(arguments: argparse.Namespace, targets: dict[str, float]) -> str:
    """Return the text of a recipe with one target for each layer."""
    group: dict[str, Any] = {"layers": list(targets), "method": arguments.method, "allocation": targets}
    if arguments.types is not None:
        group["types"] = arguments.types
    if arguments.pattern != "unstructured":
        group["pattern"] = arguments.pattern
    if arguments.refit:
        group["refit"] = True
    text = f"{arguments.target:g} of all weights removed where that costs least, as measured on {arguments.model}."
    return yaml.safe_dump({"version": 1, "description": text, "groups": [group]}, sort_keys=False, width=120)

"""Values of the parsed options: a recipe, a model with its weights, calibration data, inputs."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from sparsify.calibration.generated import generate_data
from sparsify.cli.calibration_data import BATCH, GENERATED, SAMPLES, TOKENS, load_data, load_sources
from sparsify.cli.model_inputs import check_inputs, make_inputs
from sparsify.cli.models import build_model, build_pretrained, load_weights, named_weights
from sparsify.cli.printing import note
from sparsify.cli.quality import N_BATCHES
from sparsify.cli.user_code import UserCodeError, blaming
from sparsify.errors import CheckpointError, RecipeError
from sparsify.offload.streaming import CACHE_BYTES
from sparsify.recipes.loading import load_recipe
from sparsify.recipes.schema import Recipe
from sparsify.recipes.yaml_file import read_text
from sparsify.reporting.model_run import Inputs


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Read the recipe file, or make one group of the options."""
    options = {
        key: getattr(arguments, key)
        for key in [
            "sparsity",
            "method",
            "pattern",
            "allocation",
            "max_sparsity",
            "refit",
            "correct",
            "swap",
            "exclude",
            "seed",
        ]
    }
    options |= {"layers": arguments.include, "types": arguments.types}
    given = {key: value for key, value in options.items() if value is not None}
    if arguments.recipe:
        for stage in ("reconstruct", "recover", "move"):
            if getattr(arguments, stage) is not None:
                written = "'recover: {move: true}'" if stage == "move" else f"a {stage} stage"
                raise ValueError(f"--{stage} has no effect beside --recipe; write {written} in the recipe")
        if given:
            option = "include" if "layers" in given else next(iter(given)).replace("_", "-")
            raise ValueError(
                f"--{option} has no effect beside --recipe; set the recipe's variables with --set NAME=VALUE"
            )
        return load_recipe(arguments.recipe, **variables(arguments.set))
    if arguments.move and arguments.recover is None:
        raise ValueError("--move is for the tuning of --recover; give its budget, such as --recover 240")
    for stage in ("reconstruct", "recover"):
        if getattr(arguments, stage) is not None and not given:
            raise ValueError(f"--{stage} follows pruning; say how with --sparsity FRACTION")
    if arguments.set:
        raise ValueError("--set has no effect without --recipe")
    if not given:
        raise ValueError("say what to do with --recipe FILE or --sparsity FRACTION")
    try:
        stages: dict[str, Any] = {}
        if arguments.recover is not None:
            stages["recover"] = {**arguments.recover, "move": bool(arguments.move)}
        if arguments.reconstruct is not None:
            stages["reconstruct"] = {"epochs": arguments.reconstruct}
        return Recipe.model_validate({"groups": [given], **stages})
    except ValidationError as error:
        first = error.errors()[0]
        option = {"layers": "--include: ", "epochs": "--reconstruct: ", 0: ""}.get(
            first["loc"][-1], f"--{first['loc'][-1]}: "
        )
        raise ValueError(option + first["msg"].removeprefix("Value error, ")) from None


@contextlib.contextmanager
def naming(recipe: str | None) -> Iterator[None]:
    """Turn an error about a recipe file and its model into a RecipeError with the name of the file."""
    try:
        yield
    except (CheckpointError, UserCodeError):
        raise
    except ValueError as error:
        if recipe is None:
            raise
        raise RecipeError(f"{recipe}: {error}") from None


def model_of(arguments: argparse.Namespace) -> nn.Module:
    """Build the model, and load its weights if they are given; random ones of torchvision's models are said to be."""
    if arguments.weights and (named := named_weights(arguments.model, arguments.weights)) is not None:
        return build_pretrained(arguments.model, named)
    model = build_model(arguments.model)
    if arguments.model.startswith(("torchvision:", "timm:")) and not arguments.weights:
        by_name = "--weights DEFAULT or " if arguments.model.startswith("torchvision:") else ""
        note(f"{arguments.model} has random weights here; {by_name}--weights FILE gives trained ones")
    if arguments.weights:
        load_weights(model, arguments.weights)
    return model


def data_of(arguments: argparse.Namespace) -> Any:
    """Read the calibration data, or return None if there is none."""
    sizes = {"samples": arguments.samples, "tokens": arguments.sample_tokens}
    given = {key: n for key, n in sizes.items() if n is not None}
    if arguments.data is None:
        if given:
            raise ValueError("--samples and --sample-tokens have no effect without --data")
        return None
    if GENERATED in arguments.data and not Path(GENERATED).exists():
        return _generated(arguments, **{"samples": SAMPLES, "tokens": TOKENS, **given})
    return load_sources(arguments.data, arguments.model, weights=arguments.weights, **given)


def _generated(arguments: argparse.Namespace, samples: int, tokens: int) -> list[Any]:
    """Let the dense language model write its calibration data."""
    if arguments.data != [GENERATED]:
        raise ValueError(f"--data {GENERATED} is for where no text is at hand; leave it out, or the other sources")
    if getattr(arguments, "stream", False):
        raise ValueError(f"--data {GENERATED} needs the model in memory, which --stream does without; give texts")
    model = model_of(arguments)
    note(f"--data {GENERATED}: {samples} texts of {tokens} tokens, written by {arguments.model} itself")
    with blaming(f"--data {GENERATED}"):
        return generate_data(model, samples, tokens, progress=not getattr(arguments, "json", False))


def other_data_of(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Read the first batches of each source of --check."""
    if arguments.check is None:
        return {}
    if arguments.data is None:
        raise ValueError("--check compares with the calibration data; give --data")
    tokens = {} if arguments.sample_tokens is None else {"tokens": arguments.sample_tokens}
    found = {}
    for source in arguments.check:
        try:
            n = N_BATCHES * BATCH
            batches = load_data(source, arguments.model, weights=arguments.weights, samples=n, **tokens)
            found[source] = list(itertools.islice(batches, N_BATCHES))
        except ValueError as error:
            raise ValueError(str(error).replace("--data", "--check")) from error
        if not found[source]:
            raise ValueError(f"--check {source}: no batch in it")
    return found


def given_inputs(arguments: argparse.Namespace) -> bool:
    """Return whether any option of inputs is given."""
    return (arguments.batch, arguments.seq, arguments.shape, arguments.inputs) != (None, None, None, None)


def inputs_of(arguments: argparse.Namespace, model: nn.Module, spec: str) -> Inputs:
    """Make inputs for the model named on the command line, and run it on them once as a check."""
    inputs = make_inputs(
        model,
        spec,
        batch=arguments.batch,
        seq=arguments.seq,
        shape=arguments.shape,
        function=arguments.inputs,
    )
    check_inputs(model, spec, inputs)
    return inputs


def variables(settings: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE; the value is YAML: 0.5, [a, b] and true mean the same as in a recipe."""
    variables = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write NAME=VALUE")
        try:
            variables[name] = read_text(value, f"--set {setting}").content
        except RecipeError as error:
            raise ValueError(str(error)) from None
    return variables


def conversion(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `convert`, but for the choice of layers."""
    return {"tied": arguments.tied, "functional": arguments.functional}


def form_of(
    arguments: argparse.Namespace, recipe: Recipe, data: Sequence[Any] | None = None, inputs: Inputs | None = None
) -> dict[str, Any]:
    """Return the options of `export`, with the first batch to judge what may be int8, or inputs to measure on."""
    given, in_recipe = arguments.quantize, recipe.quantize
    if given is not None and in_recipe is not None and given != in_recipe:
        raise ValueError(f"--quantize {given}: the recipe says {in_recipe!r}; leave one of them out")
    measured = arguments.format == "auto" and arguments.tokens is None
    return {
        "format": arguments.format,
        "tokens": arguments.tokens,
        "quantize": given or in_recipe,
        "example": data[0] if data and (given or in_recipe) else inputs if measured else None,
        "quantize_rest": arguments.quantize_rest,
    }


def cache_of(arguments: argparse.Namespace) -> int:
    """Return the bytes of activations to keep in memory."""
    return CACHE_BYTES if arguments.cache is None else int(arguments.cache * 1e9)

"""The command line: sparsify compress | sensitivity | inspect | plan | bench | doctor | schema.

Exit codes: 0 done; 2 wrong arguments, model or weights; 3 a recipe that cannot be followed; 4 an invalid checkpoint;
5 a file that cannot be opened or written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from tqdm import tqdm

import sparsify
from sparsify.calibration.data_parallel import is_first, same_everywhere, together
from sparsify.cli.calibration_data import SAMPLES, TOKENS, load_data
from sparsify.cli.layer_by_layer import (
    Compressed,
    Qualities,
    cache_of,
    compress_layer_by_layer,
    conversion,
    evaluation,
    measure,
    quality_table,
    sensitivity_table,
)
from sparsify.cli.model_inputs import Inputs, check_inputs, make_inputs
from sparsify.cli.models import build_model, load_weights
from sparsify.conversion.tied_weights import TIED
from sparsify.errors import CheckpointError, LeftDenseWarning, RecipeError
from sparsify.hardware.machine import doctor
from sparsify.inference.export import FORMATS, check_format
from sparsify.masking.methods.registry import CALIBRATED, METHODS, SOLVERS
from sparsify.offload.fingerprints import data_fingerprint
from sparsify.outputs import check_writable
from sparsify.pruning.sensitivity import SPARSITIES
from sparsify.recipes.dry_run import PlannedLayer, plan
from sparsify.recipes.recipe import Recipe, assign_layers, load_recipe
from sparsify.recipes.yaml_file import read_text
from sparsify.reporting.model_bench import bench
from sparsify.reporting.report import Report, table

_MODEL_HELP = "torchvision:NAME, hf:FOLDER, or package.module:builder"
_MAX_COLUMNS = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", LeftDenseWarning)
            warnings.showwarning = _show_warning
            arguments.run(arguments)
    except RecipeError as error:
        return _fail(3, error)
    except CheckpointError as error:
        return _fail(4, error)
    except (ValueError, TypeError) as error:
        return _fail(2, error)
    except OSError as error:
        return _fail(5, error)
    return 0


def compress(arguments: argparse.Namespace) -> None:
    """Build a model, prune it, export it, and save it; then read back what the file holds.

    Under torchrun the processes share the calibration data, and the first one does the rest.
    """
    recipe = _recipe_of(arguments)
    check_format(arguments.format, arguments.tokens, torch.device("cpu"))
    out = Path(arguments.out)
    check_writable(out, "--out ")
    by_layer = arguments.stream or arguments.resume
    if arguments.cache is not None and arguments.data is None:
        raise ValueError("--cache has no effect without --data")
    if arguments.cache is not None and not arguments.cache >= 0:
        raise ValueError(f"--cache is a number of GB, got {arguments.cache}")
    data = _data_of(arguments)
    if data is None and by_layer:
        raise ValueError("--stream and --resume are for pruning on calibration data; give --data")
    with together():
        if data is not None:
            data = list(data)
            if not same_everywhere(int(data_fingerprint(data)[:15], 16)):
                raise ValueError("--data: not the same batches in every process; draw them with a fixed seed")
        done = (_compress_layer_by_layer if by_layer else _compress_in_memory)(arguments, recipe, data, out)
    if done is not None:
        _tell(arguments, out, *done)


def _compress_in_memory(arguments: argparse.Namespace, recipe: Recipe, data: Any, out: Path) -> Compressed | None:
    """Compress a model in one go."""
    quiet = arguments.json or not is_first()
    evaluate = evaluation(arguments.eval) if arguments.eval and is_first() else None
    quality: dict[str, Qualities] = {}
    with tqdm(total=5, desc="build the model", bar_format="{desc:<28}{bar}| {n_fmt}/{total_fmt}", disable=quiet) as bar:
        model = _model_of(arguments)
        if evaluate:
            quality["dense"] = evaluate(model)
        _advance(bar, "convert its layers")
        with _naming(arguments.recipe):
            assign_layers(recipe, model)
        for group in recipe.groups:
            model = sparsify.convert(model, include=group.layers, exclude=group.exclude, **conversion(arguments))
        _advance(bar, "prune")
        if not is_first():  # which alone recovers
            recipe = recipe.model_copy(update={"recover": None})
        with _naming(arguments.recipe):
            cache_bytes = None if data is None else cache_of(arguments)
            sparsify.apply(model, recipe, data=data, cache_bytes=cache_bytes, progress=not quiet)
        if not is_first():
            return None
        _advance(bar, "export")
        fast = sparsify.export(model, format=arguments.format, tokens=arguments.tokens)
        _advance(bar, f"save {out.name}")
        sparsify.save(fast, out)
        if evaluate:
            quality["sparse"] = evaluate(fast)
        _advance(bar, "done")
    return sparsify.report(fast), quality


def _compress_layer_by_layer(arguments: argparse.Namespace, recipe: Recipe, data: Any, out: Path) -> Compressed | None:
    """Do the same so that it can be interrupted, and, with --stream, with the weights on disk."""
    with _naming(arguments.recipe):
        model = None if arguments.stream else _model_of(arguments)
        return compress_layer_by_layer(arguments, recipe, data, out, model)


def _tell(arguments: argparse.Namespace, out: Path, report: Report, quality: dict[str, Qualities]) -> None:
    """Print what became of the layers, and of the model's quality."""
    n_bytes = out.stat().st_size
    if arguments.json:
        found: dict[str, Any] = {"file": str(out), "file_bytes": n_bytes}
        if arguments.stream:  # the model is nowhere in memory, and its file may not fit
            found["in_file"] = _rows(report)
        else:
            found |= {"in_memory": _rows(report), "in_file": _rows(sparsify.inspect(out))}
        _print_json(found | ({"quality": quality} if quality else {}))
        return
    print(report)
    if quality:
        print(f"\n{quality_table(**quality)}")
    print(f"\n{out}: {n_bytes:,} bytes")
    print(f"next: sparsify inspect {out}")
    print(f"      python: model = sparsify.load({str(out)!r}, the_dense_model)")


def sensitivity(arguments: argparse.Namespace) -> None:
    """Measure what pruning each layer alone does to the model's output, and write a recipe for a budget."""
    data = _data_of(arguments)
    if data is None:
        raise ValueError("give calibration data with --data: texts, pictures, or package.module:function")
    measured, targets = measure(arguments, _model_of(arguments), data)
    if arguments.json:
        _print_json({"sparsities": measured.sparsities, "damage": dict(measured.damage), "targets": targets})
        return
    print("squared change of the model's output, relative to its variance, with one layer pruned to:")
    print(sensitivity_table(measured, targets))
    if arguments.recipe:
        print(f"\nnext: sparsify compress --model {arguments.model} --recipe {arguments.recipe} --data ... --out ...")


def inspect(arguments: argparse.Namespace) -> None:
    """List what a file holds, or what convert would do with a model."""
    if os.path.exists(arguments.what) or ":" not in arguments.what:
        _inspect_file(arguments)
        return
    arguments.model = arguments.what
    model = build_model(arguments.model)
    example = None
    if arguments.once:
        example = _inputs_of(arguments, model)
    elif _given_inputs(arguments):
        raise ValueError("--batch, --seq, --shape and --inputs have no effect without --run")
    found = sparsify.inspect(model, example)
    if not arguments.json:
        print(found)
        return
    _print_json({"model": arguments.model, **dataclasses.asdict(found)})


def _inspect_file(arguments: argparse.Namespace) -> None:
    if arguments.once or _given_inputs(arguments):
        raise ValueError(f"{arguments.what} is a file; --run and the options of its inputs are for models")
    report = sparsify.inspect(arguments.what)
    n_bytes = os.path.getsize(arguments.what)
    if arguments.json:
        _print_json({"file": arguments.what, "file_bytes": n_bytes, "in_file": _rows(report)})
        return
    print(report)
    print(f"\n{arguments.what}: {n_bytes:,} bytes, {n_bytes - report.total.n_bytes:,} of it other tensors and header")


def plan_recipe(arguments: argparse.Namespace) -> None:
    """Print every layer of a recipe, its target at each update, and the size it will have."""
    recipe = load_recipe(arguments.recipe, **_variables(arguments.set))
    model = _model_of(arguments)
    with _naming(arguments.recipe):
        layers = plan(recipe, model)
    n_bytes, dense_bytes = sum(x.n_bytes for x in layers), sum(x.dense_bytes for x in layers)
    if arguments.json:
        keys = ("name", "group", "shape", "unit", "targets", "ranked", "n_bytes", "dense_bytes")
        _print_json(
            {
                "layers": [{key: getattr(layer, key) for key in keys} for layer in layers],
                "n_bytes": n_bytes,
                "dense_bytes": dense_bytes,
            }
        )
        return
    for number in range(len(recipe.groups)):
        print(f"groups.{number}")
        print(_plan_table([layer for layer in layers if layer.group == number]), end="\n\n")
    if any(layer.ranked for layer in layers):
        print("~ layers ranked together: each one's part is taken from the present weights, and moves with training")
    share = n_bytes / max(dense_bytes, 1)
    print(f"{len(layers)} layers: {n_bytes:,} bytes in the file, {share:.3f} of dense {dense_bytes:,}")


def bench_model(arguments: argparse.Namespace) -> None:
    """Time the dense model and its pruned and exported copy, in turns."""
    if not 0 <= arguments.sparsity <= 1:
        raise ValueError(f"--sparsity must be between 0 and 1, got {arguments.sparsity}")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    model = _model_of(arguments)
    inputs = _inputs_of(arguments, model)
    result = bench(model, inputs, arguments.sparsity, **conversion(arguments))
    if arguments.json:
        _print_json({**dataclasses.asdict(result), "speedup": result.speedup})
        return
    print(result)


def schema(arguments: argparse.Namespace) -> None:
    """Print the JSON schema of recipes, for editors."""
    _print_json(Recipe.model_json_schema())


def run_doctor(arguments: argparse.Namespace) -> None:
    """Print what decides how fast exported layers are here."""
    rows = doctor()
    if arguments.json:
        _print_json([dict(zip(("what", "found", "do"), row, strict=True)) for row in rows])
        return
    for what, found, to_do in rows:
        print(f"{what + ':':16}{found}" + (f"\n{'':16}-> {to_do}" if to_do else ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparsify", description="Prune a PyTorch model and keep only what is left.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def model_arguments(sub: argparse.ArgumentParser, *, recipe: bool = True) -> None:
        sub.add_argument("--model", required=True, metavar="MODEL", help=_MODEL_HELP)
        sub.add_argument("--weights", metavar="FILE", help=".safetensors, or .pt opened with weights_only")
        if not recipe:
            return
        sub.add_argument(
            "--set", action="append", default=[], metavar="NAME=VALUE", help="override a variable of the recipe"
        )

    def conversion_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--tied",
            choices=TIED,
            default="error",
            help="a weight with several uses: refuse it (default), leave it dense, or let all share one mask",
        )
        sub.add_argument(
            "--functional", action="store_true", help="also weights that a module multiplies in its own code (torch.fx)"
        )

    sub = command("compress", compress, "Prune a trained model, export it, and save it to one file.")
    model_arguments(sub)
    sub.add_argument("--recipe", metavar="FILE", help="a YAML recipe; or say it all with the options below")
    sub.add_argument("--sparsity", type=float, help="fraction of zeros, 0 to 1")
    sub.add_argument("--method", help=f"one of: {', '.join((*METHODS, *CALIBRATED, *SOLVERS))} (default: magnitude)")
    sub.add_argument("--pattern", help='unstructured (default), rows, columns, "2:4", "4x1" ...')
    sub.add_argument("--allocation", help="uniform (default), global, erk, owl, error")
    sub.add_argument("--max-sparsity", type=float, help="no layer loses more, where the allocation shares one target")
    sub.add_argument("--refit", action="store_true", default=None, help="refit the kept weights to the data")
    sub.add_argument(
        "--correct", action="store_true", default=None, help="make up for what the layers before have lost"
    )
    sub.add_argument("--data", metavar="DATA", help="calibration data: texts, pictures, or package.module:function")
    sub.add_argument("--samples", type=int, metavar="N", help=f"texts or pictures to calibrate on (default: {SAMPLES})")
    sub.add_argument("--sample-tokens", type=int, metavar="N", help=f"tokens of each text (default: {TOKENS})")
    sub.add_argument(
        "--recover", type=_budget, metavar="BUDGET", help='then tune what is kept for so many seconds, or "200steps"'
    )
    sub.add_argument("--stream", action="store_true", help="read weights from disk block by block (.safetensors)")
    sub.add_argument("--resume", action="store_true", help="keep what is finished in OUT.partial, and go on from there")
    sub.add_argument("--cache", type=float, metavar="GB", help="activations in memory, the rest on disk (default: 1)")
    sub.add_argument("--eval", metavar="MODULE:FUNCTION", help="a function of the model: its quality, before and after")
    sub.add_argument("--include", action="append", metavar="PATTERN", help="layers to prune (default: all)")
    sub.add_argument("--exclude", action="append", metavar="PATTERN", help="layers to leave dense")
    conversion_arguments(sub)
    sub.add_argument("--seed", type=int, help="for methods that draw random numbers")
    sub.add_argument("--format", default="auto", choices=FORMATS, help="form of the weights in memory (default: auto)")
    sub.add_argument("--tokens", type=int, metavar="N", help="rows of input that auto measures with (default: 128)")
    sub.add_argument("--out", required=True, metavar="FILE", help="the file to write (.safetensors)")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    sub = command("sensitivity", sensitivity, "Measure what each layer can lose, and write a recipe for a budget.")
    model_arguments(sub, recipe=False)
    sub.add_argument("--data", metavar="DATA", help="calibration data: texts, pictures, or package.module:function")
    sub.add_argument("--samples", type=int, metavar="N", help=f"texts or pictures to calibrate on (default: {SAMPLES})")
    sub.add_argument("--sample-tokens", type=int, metavar="N", help=f"tokens of each text (default: {TOKENS})")
    sub.add_argument("--method", default="magnitude", help="how each layer is pruned (default: magnitude)")
    sub.add_argument("--pattern", default="unstructured", help='unstructured (default), rows, columns, "4x1" ...')
    sub.add_argument("--refit", action="store_true", help="refit the kept weights to the data")
    sub.add_argument("--sparsities", type=_fractions, default=SPARSITIES, metavar="S,S", help="what to measure at")
    sub.add_argument("--target", type=float, metavar="SPARSITY", help="the budget: fraction of zeros of all layers")
    sub.add_argument("--max-sparsity", type=float, help="no layer loses more (default: the last of --sparsities)")
    sub.add_argument("--recipe", metavar="FILE", help="the recipe to write for the budget")
    sub.add_argument("--picture", metavar="FILE", help="draw it (.png, .svg); needs matplotlib")
    sub.add_argument("--include", action="append", metavar="PATTERN", help="layers to measure (default: all)")
    sub.add_argument("--exclude", action="append", metavar="PATTERN", help="layers to leave dense")
    conversion_arguments(sub)
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    def input_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--batch", type=int, metavar="B", help="inputs at once (default: 1)")
        sub.add_argument("--seq", type=int, metavar="L", help="token ids per input (default for hf: 128)")
        sub.add_argument(
            "--shape", type=_shape, metavar="C,H,W", help="of one input (default for torchvision: 3,224,224)"
        )
        sub.add_argument("--inputs", metavar="MODULE:FUNCTION", help="a function that returns the model's arguments")

    sub = command("inspect", inspect, "List the layers in a file, or what convert would do with a model.")
    sub.add_argument("what", metavar="FILE_OR_MODEL", help=f"a file written by save; or a model: {_MODEL_HELP}")
    sub.add_argument("--run", dest="once", action="store_true", help="run the model once, to count multiply-adds too")
    input_arguments(sub)
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    sub = command("plan", plan_recipe, "Show what a recipe would do to a model, and do nothing.")
    sub.add_argument("recipe", metavar="RECIPE")
    model_arguments(sub)
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    sub = command("bench", bench_model, "Time a model here, dense against pruned and exported, whole and by layer.")
    model_arguments(sub, recipe=False)
    sub.add_argument("--sparsity", type=float, default=0.9, help="of every Linear, by magnitude (default: 0.9)")
    conversion_arguments(sub)
    input_arguments(sub)
    sub.add_argument("--threads", type=int, metavar="N", help="default: torch's")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    sub = command("doctor", run_doctor, "Say what this machine has for sparse layers, and what is missing.")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    command("schema", schema, "Print the JSON schema of recipes, for editors.")
    return parser


def _recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Read the recipe file, or make one group of the options."""
    options = {
        key: getattr(arguments, key)
        for key in (
            "sparsity",
            "method",
            "pattern",
            "allocation",
            "max_sparsity",
            "refit",
            "correct",
            "exclude",
            "seed",
        )
    }
    options["layers"] = arguments.include
    given = {key: value for key, value in options.items() if value is not None}
    if arguments.recipe:
        if arguments.recover is not None:
            raise ValueError("--recover has no effect beside --recipe; write a recover stage in the recipe")
        if given:
            option = "include" if "layers" in given else next(iter(given)).replace("_", "-")
            raise ValueError(
                f"--{option} has no effect beside --recipe; set the recipe's variables with --set NAME=VALUE"
            )
        return load_recipe(arguments.recipe, **_variables(arguments.set))
    if arguments.recover is not None and not given:
        raise ValueError("--recover follows pruning; say how with --sparsity FRACTION")
    if arguments.set:
        raise ValueError("--set has no effect without --recipe")
    if not given:
        raise ValueError("say what to do with --recipe FILE or --sparsity FRACTION")
    try:
        stage = {} if arguments.recover is None else {"recover": arguments.recover}
        return Recipe.model_validate({"groups": [given], **stage})
    except ValidationError as error:
        first = error.errors()[0]
        option = {"layers": "--include: ", 0: ""}.get(first["loc"][-1], f"--{first['loc'][-1]}: ")
        raise ValueError(option + first["msg"].removeprefix("Value error, ")) from None


@contextlib.contextmanager
def _naming(recipe: str | None) -> Iterator[None]:
    """Make an error of a recipe file that does not fit the model a RecipeError that names the file."""
    try:
        yield
    except ValueError as error:
        if recipe is None:
            raise
        raise RecipeError(f"{recipe}: {error}") from None


def _model_of(arguments: argparse.Namespace) -> Any:
    model = build_model(arguments.model)
    if arguments.weights:
        load_weights(model, arguments.weights)
    return model


def _data_of(arguments: argparse.Namespace) -> Any:
    """Read the calibration data, or return None if there is none."""
    sizes = {"samples": arguments.samples, "tokens": arguments.sample_tokens}
    given = {key: n for key, n in sizes.items() if n is not None}
    if arguments.data is None:
        if given:
            raise ValueError("--samples and --sample-tokens have no effect without --data")
        return None
    return load_data(arguments.data, arguments.model, **given)


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of fractions; write 0.5,0.7,0.9") from None


def _budget(text: str) -> dict[str, float]:
    """Read the budget of a recovery: 240 is seconds, 200steps a number of batches."""
    n_steps = text.removesuffix("steps").strip()
    try:
        budget: dict[str, float] = {"seconds": float(text)} if n_steps == text.strip() else {"steps": int(n_steps)}
    except ValueError:
        budget = {}
    if not any(amount > 0 for amount in budget.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is no budget; write 240 (seconds) or 200steps")
    return budget


def _given_inputs(arguments: argparse.Namespace) -> bool:
    return (arguments.batch, arguments.seq, arguments.shape, arguments.inputs) != (None, None, None, None)


def _inputs_of(arguments: argparse.Namespace, model: Any) -> Inputs:
    """Make inputs for the model named on the command line, and check that it takes them."""
    inputs = make_inputs(
        model,
        arguments.model,
        batch=arguments.batch,
        seq=arguments.seq,
        shape=arguments.shape,
        function=arguments.inputs,
    )
    check_inputs(model, arguments.model, inputs)
    return inputs


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write 3,224,224") from None


def _variables(settings: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE; the value is YAML, so that 0.5, [a, b] and true mean what they mean in a recipe."""
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


def _plan_table(layers: Sequence[PlannedLayer]) -> str:
    """Show a group's layers; of many updates the first, some between, and the last."""
    n = len(layers[0].targets)
    step = -(-n // _MAX_COLUMNS)
    shown = sorted({*range(0, n, step), n - 1})
    head = ["layer", "shape", *(f"{layers[0].unit} {layers[0].targets[i][0]:g}" for i in shown), "bytes", "of dense"]
    lines = [head]
    for x in layers:
        mark = "~" if x.ranked else ""
        targets = [f"{mark}{x.targets[i][1]:.4f}" for i in shown]
        share = f"{x.n_bytes / max(x.dense_bytes, 1):.3f}"
        lines.append([x.name or "(root)", f"{x.shape[0]}x{x.shape[1]}", *targets, f"{x.n_bytes:,}", share])
    return table(lines)


def _rows(report: Report) -> list[dict[str, Any]]:
    return [vars(row) for row in (*report, report.total)]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _advance(bar: Any, text: str) -> None:
    bar.update(1)
    bar.set_description(text)


def _fail(code: int, error: Exception) -> int:
    print(f"sparsify: {error}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"sparsify: note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

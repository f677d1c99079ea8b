"""The parser: arguments of every command, their help, and the checks of single values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import sparsify
from sparsify.cli.calibration_data import SAMPLES, TOKENS
from sparsify.cli.completion import SHELLS, completion
from sparsify.cli.compress import compress
from sparsify.cli.pages import write_page
from sparsify.cli.recipes import recipes
from sparsify.cli.sensitivity import sensitivity
from sparsify.cli.show import bench_model, inspect, plan_recipe, print_native_paths, run_doctor, schema
from sparsify.conversion.tied_weights import TIED
from sparsify.inference.export import FORMATS
from sparsify.inference.rounding import QUANTIZE
from sparsify.masking.methods.registry import CALIBRATED, METHODS, SOLVERS
from sparsify.pruning.sensitivity import SPARSITIES

_MODEL_HELP = "torchvision:NAME, timm:NAME, hf:FOLDER, or package.module:builder"
_DEBUG_HELP = "print the traceback of an error too"
_EPILOG = """package.module:function runs your code: the module is imported, from the present folder if it lies there.
No other option runs code of a file or folder."""

#: add_argument of a parser, or of a group of its arguments.
Add = Callable[..., argparse.Action]


class Groups:
    """The groups of a command's arguments in its help, made when first named."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser
        self._groups: dict[str, Add] = {"": parser.add_argument}

    def __call__(self, title: str = "") -> Add:
        """Return add_argument of the group with this title, of the command itself for ""."""
        if title not in self._groups:
            self._groups[title] = self._parser.add_argument_group(title).add_argument
        return self._groups[title]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `run` of the parsed arguments is the function of the command."""
    parser = argparse.ArgumentParser(
        prog="sparsify",
        description="Prune a PyTorch model and keep only what is left.",
        epilog=f"begin with:\n  sparsify COMMAND --help\n{_examples('doctor', 'inspect', 'compress')}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
    parser.add_argument("--version", action="version", version=f"sparsify {sparsify.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text, add_arguments in _COMMANDS:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"examples:\n{_examples(name)}\n\n{_EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run, parser=make_parser)
        add_arguments(Groups(command))
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG_HELP)
    return parser


def _examples(*names: str) -> str:
    return "\n".join(f"  sparsify {name} {rest}".rstrip() for name in names for rest in EXAMPLES[name])


def _compress(group: Groups) -> None:
    _model(group("the model"))
    prune = group("the pruning")
    prune("--recipe", metavar="RECIPE", help="a YAML file, or a name of `sparsify recipes`; or the options below")
    _set(prune)
    prune("--sparsity", type=float, help="fraction of zeros, 0 to 1")
    prune("--method", help=f"one of: {', '.join((*METHODS, *CALIBRATED, *SOLVERS))} (default: magnitude)")
    prune("--pattern", help='unstructured (default), rows, columns, "2:4", "4x1" ...')
    prune("--allocation", help="uniform (default), global, erk, owl, error, depth:0.1")
    prune("--max-sparsity", type=float, help="no layer loses more, where the allocation shares one target")
    prune("--refit", action="store_true", default=None, help="refit the kept weights to the data")
    prune("--correct", action="store_true", default=None, help="make up for what the layers before have lost")
    prune("--swap", action="store_true", default=None, help="weights change places where that lowers a layer's error")
    text = "tune each block once it is pruned, so many times over the data"
    prune("--reconstruct", type=int, metavar="EPOCHS", help=text)
    prune("--recover", type=_budget, metavar="BUDGET", help='then tune what is kept for so many seconds, or "200steps"')
    prune("--move", action="store_true", default=None, help="let masks move while --recover tunes")
    prune("--seed", type=int, help="for methods that draw random numbers")
    _layers(group("the layers"), "prune")
    data = group("calibration data, and large models")
    _data(data)
    text = "other data, to see if the quality carries over to it"
    data("--check", nargs="+", metavar="DATA", help=text)
    data("--stream", action="store_true", help="read weights from disk block by block (.safetensors)")
    data("--resume", action="store_true", help="keep what is finished in OUT.partial, and go on from there")
    data("--cache", type=float, metavar="GB", help="activations in memory, the rest on disk (default: 1)")
    out = group("the result")
    out("--out", required=True, metavar="FILE", help="the file to write (.safetensors)")
    out("--format", default="auto", choices=FORMATS, help="form of the weights in memory (default: auto)")
    out("--quantize", choices=QUANTIZE, help="round the kept weights to int8, and inputs where that is faster, or not")
    out("--quantize-rest", action="store_true", help="int8 for Embeddings and for what stays dense, too")
    out("--tokens", type=int, metavar="N", help="rows of input that auto measures with (default: those of the inputs)")
    out("--eval", metavar="MODULE:FUNCTION", help="a function of the model: its quality, before and after")
    out("--report", metavar="FILE", help="also write a page about the result (.html)")
    _json(out)
    _inputs(group("inputs to time the model on"))


def _sensitivity(group: Groups) -> None:
    _model(group("the model"))
    _data(group("calibration data"))
    add = group("the measurement")
    add("--method", default="magnitude", help="how each layer is pruned (default: magnitude)")
    add("--pattern", default="unstructured", help='unstructured (default), rows, columns, "4x1" ...')
    add("--refit", action="store_true", help="refit the kept weights to the data")
    add("--sparsities", type=_fractions, default=SPARSITIES, metavar="S,S", help="what to measure at")
    _layers(group("the layers"), "measure")
    add = group("the result")
    add("--target", type=float, metavar="SPARSITY", help="the budget: fraction of zeros of all layers")
    add("--max-sparsity", type=float, help="no layer loses more (default: the last of --sparsities)")
    add("--recipe", metavar="FILE", help="the recipe to write for the budget")
    add("--picture", metavar="FILE", help="draw it (.png, .svg); needs matplotlib")
    _json(add)


def _inspect(group: Groups) -> None:
    text = f"a file written by save; or {_MODEL_HELP} of an installed package: nothing is imported from this folder"
    group()("what", nargs="?", metavar="FILE_OR_MODEL", help=text)
    group()("--model", metavar="MODEL", help=f"{_MODEL_HELP}, importable from this folder too")
    group()("--run", dest="once", action="store_true", help="run the model once, to count multiply-adds too")
    _inputs(group("inputs to run the model on"))
    _json(group())


def _plan(group: Groups) -> None:
    group()("recipe", metavar="RECIPE", help="a YAML file, or a name of `sparsify recipes`")
    _model(group())
    _set(group())
    _json(group())


def _bench(group: Groups) -> None:
    _model(group("the model"))
    _conversion(group("the model"))
    group()("--sparsity", type=float, default=0.9, help="of every Linear, by magnitude (default: 0.9)")
    _inputs(group("inputs to time the model on"))
    group()("--threads", type=int, metavar="N", help="default: torch's")
    group()("--torch-only", action="store_true", help="do not measure dense engines other than torch's float32")
    _json(group())


def _model(add: Add) -> None:
    add("--model", required=True, metavar="MODEL", help=_MODEL_HELP)
    add("--weights", metavar="FILE", help=".safetensors, .pt opened with weights_only, or DEFAULT for torchvision's")


def _set(add: Add) -> None:
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="override a variable of the recipe")


def _data(add: Add) -> None:
    text = "calibration data: texts, pictures, or package.module:function; several sources have equal shares; or "
    text += "generated, texts that a language model writes itself"
    add("--data", nargs="+", metavar="DATA", help=text)
    add("--samples", type=int, metavar="N", help=f"texts or pictures to calibrate on (default: {SAMPLES})")
    add("--sample-tokens", type=int, metavar="N", help=f"tokens of each text (default: {TOKENS})")


def _layers(add: Add, verb: str) -> None:
    add("--include", action="append", metavar="PATTERN", help=f"layers to {verb} (default: all)")
    add("--exclude", action="append", metavar="PATTERN", help="layers to leave dense")
    types = "dense types to convert, instead of the default ones: Linear,Conv2d"
    add("--types", type=lambda text: text.split(","), metavar="TYPE,TYPE", help=types)
    _conversion(add)


def _conversion(add: Add) -> None:
    tied = "a weight with several uses: refuse it (default), leave it dense, or let all share one mask"
    add("--tied", choices=TIED, default="error", help=tied)
    add("--functional", action="store_true", help="also weights that a module multiplies in its own code (torch.fx)")


def _inputs(add: Add) -> None:
    add("--batch", type=int, metavar="B", help="inputs at once (default: 1)")
    add("--seq", type=int, metavar="L", help="token ids per input (default for hf: 128)")
    add("--shape", type=_shape, metavar="C,H,W", help="of one input (default for torchvision: 3,224,224)")
    add("--inputs", metavar="MODULE:FUNCTION", help="a function that returns the model's arguments")


def _json(add: Add) -> None:
    add("--json", action="store_true", help="print JSON instead of a table")


def _recipes(group: Groups) -> None:
    group()("name", nargs="?", metavar="NAME", help="print this recipe, to copy it")
    _json(group())


def _report(group: Groups) -> None:
    group()("file", metavar="FILE", help="a file written by save")
    group()("--html", required=True, metavar="FILE", help="the page to write; it needs nothing from anywhere")


def _doctor(group: Groups) -> None:
    _json(group())


def _native(group: Groups) -> None:
    places = {"shared_library": "the library", "include": "the folder of sparsify.h", "cmake": "that for find_package"}
    for name, what in places.items():
        option = f"--{name.removeprefix('shared_')}"
        group()(option, dest="place", action="store_const", const=name, help=f"print {what} alone")


def _completion(group: Groups) -> None:
    group()("shell", choices=SHELLS, help="the shell that reads the script")


def _nothing(_: Groups) -> None:
    """Add no argument."""


#: Name, function, help, and the function to add the arguments, in the order of the printed help.
_COMMANDS: tuple[tuple[str, Callable[[argparse.Namespace], None], str, Callable[[Groups], None]], ...] = (
    ("compress", compress, "Prune a trained model, export it, and save it to one file.", _compress),
    ("sensitivity", sensitivity, "Measure what each layer can lose, and write a recipe for a budget.", _sensitivity),
    ("inspect", inspect, "List the layers in a file, or what convert would do with a model.", _inspect),
    ("report", write_page, "Write a page about a file: sizes, times, masks, how to load it.", _report),
    ("plan", plan_recipe, "Show what a recipe would do to a model, and do nothing.", _plan),
    ("recipes", recipes, "List the recipes that come with the package, or print one to copy.", _recipes),
    ("bench", bench_model, "Time a model here, dense against pruned and exported, whole and by layer.", _bench),
    ("doctor", run_doctor, "Say what this machine has for sparse layers, and what is missing.", _doctor),
    ("native", print_native_paths, "Print where the C library is, for programs without Python.", _native),
    ("schema", schema, "Print the JSON schema of recipes, for editors.", _nothing),
    ("completion", completion, "Print a script with which a shell completes commands and options.", _completion),
)

#: Arguments to begin with, of each command.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "compress": (
        "--model hf:FOLDER --sparsity 0.8 --out small.safetensors",
        "--model hf:FOLDER --recipe alps-80 --data texts/ --out small.safetensors",
        "--model torchvision:vit_b_16 --weights DEFAULT --data pictures/ --recipe wanda-2-4 --out a.safetensors",
        "--model my.models:build --include 'encoder.*' --sparsity 0.9 --eval my.models:accuracy --out a.safetensors",
    ),
    "sensitivity": ("--model hf:FOLDER --data texts/ --target 0.7 --recipe mine.yaml --picture mine.png",),
    "inspect": ("small.safetensors", "torchvision:vit_b_16 --run"),
    "report": ("small.safetensors --html page.html",),
    "plan": ("magnitude-50 --model torchvision:vit_b_16 --set sparsity=0.7",),
    "recipes": ("", "gradual-magnitude-90"),
    "bench": ("--model torchvision:swin_t --sparsity 0.9 --batch 8",),
    "doctor": ("",),
    "native": ("", "--cmake"),
    "schema": ("",),
    "completion": ("bash",),
}


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
    if not any(0 < amount < math.inf for amount in budget.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is no budget; write 240 (seconds) or 200steps")
    return budget


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write 3,224,224") from None

#!/usr/bin/env python
"""Train small models on Fashion-MNIST sparsely, in every way, and write docs/results/training.md from the results.

    scripts/train.py table                                    every run of the table not in the results yet
    scripts/train.py row RigL --sparsity 0.95                 one row, three seeds
    scripts/train.py row "gradual magnitude" --model vit --sparsity 0.9
    scripts/train.py report                                   docs/results/training.md and docs/results/training.svg

Results are added to docs/results/training.jsonl, a line for each run: a table can be stopped and continued. The data is
fetched by `scripts/assets.py fashion-mnist`. A run takes half a minute on a core of its own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from assets import AssetError
from training import page
from training.rows import ROWS, SEEDS, TABLE
from training.run import run
from training.tasks import TASKS

RESULTS_FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
RESULTS = RESULTS_FOLDER / "training.jsonl"

Key = tuple[str, str, float, int]


def main(argv: Sequence[str] | None = None) -> int:
    """Train the named rows, or write the page."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "report":
            page.write(results(options.results), RESULTS_FOLDER)
        else:
            torch.set_num_threads(options.threads)
            train(options)
    except (AssetError, ValueError, OSError) as error:
        print(f"scripts/train.py: {error}", file=sys.stderr)
        return 2
    return 0


def train(options: argparse.Namespace) -> None:
    """Make the missing runs, and add each to the results when it is done."""
    rows = TABLE if options.command == "table" else (options.row,)
    wanted = [
        (options.model, row, sparsity, seed)
        for row in rows
        for sparsity in ((0.0,) if ROWS[row] is None else options.sparsity or TASKS[options.model].sparsities)
        for seed in options.seed or SEEDS
    ]
    examples = TASKS[options.model].load()
    for key in wanted:
        model, row, sparsity, seed = key
        if key in {(r["model"], r["row"], r["sparsity"], r["seed"]) for r in results(options.results)}:
            continue
        for result in run(row, sparsity, seed, examples, model):
            with options.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)


def results(file: Path) -> list[dict[str, object]]:
    """Read the runs made so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report")
    for name in ("table", "row"):
        command = commands.add_parser(name)
        if name == "row":
            command.add_argument("row", choices=list(ROWS))
        command.add_argument("--model", choices=list(TASKS), default="mlp")
        command.add_argument("--sparsity", type=float, action="append")
        command.add_argument("--seed", type=int, action="append")
        command.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""sparsify report, and --report of compress: a page about a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsify.cli.files import check_output
from sparsify.cli.summary import Compressed
from sparsify.outputs import write_text
from sparsify.recipes.loading import recipe_text
from sparsify.recipes.schema import Recipe
from sparsify.reporting.file_facts import file_facts
from sparsify.reporting.page import RunFacts, page


def write_page(arguments: argparse.Namespace) -> None:
    """Write the page about a file."""
    check_output(arguments, "html", reads=("file",))
    write_text(arguments.html, page(file_facts(arguments.file)), "--html ")
    print(f"{arguments.html}: open it in a browser")


def write_page_of_run(path: str, out: Path, recipe: Recipe, done: Compressed) -> None:
    """Write the page about the file of a finished compression."""
    run = RunFacts(done.facts(), done.quality, recipe_text(recipe), done.loader, done.dense_bytes)
    write_text(path, page(file_facts(out, done.report), run), "--report ")

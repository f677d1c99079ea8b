#!/usr/bin/env python
"""Compare the structure of sparsify with its neighbours', and write the table into docs/architecture.md.

    scripts/structure.py            print the table
    scripts/structure.py --write    put it into the page

The neighbours' wheels are downloaded from the package index and read, never installed. Relative words, those of
RELATIVE, are counted in docstrings.
"""

import argparse
import ast
import re
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- scripts/structure.py writes this table -->\n", "<!-- end of the table -->\n"
NEIGHBOURS = {"optimum-quanto": "optimum/quanto", "compressed-tensors": "compressed_tensors"}
RELATIVE = ("which", "that", "what", "whose", "whoever", "where")
RIDDLES = ("What", "How", "Which", "Whether", "Where", "Who")


def docstrings(file: Path) -> Iterator[str]:
    """Yield the docstrings of a file: of the module, its classes and functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def relative_words(package: Path) -> float:
    """Return the relative words in 100 words of a package's docstrings."""
    words = [word for file in package.rglob("*.py") for text in docstrings(file) for word in _words(text)]
    return 100 * sum(word in RELATIVE for word in words) / len(words)


def riddles(package: Path) -> list[str]:
    """Return the first lines of docstrings beginning with one of RIDDLES, each with its file."""
    first = rf"({'|'.join(RIDDLES)})\b"
    return [
        f"{file.relative_to(package)}: {text.splitlines()[0]}"
        for file in sorted(package.rglob("*.py"))
        for text in docstrings(file)
        if re.match(first, text)
    ]


def row(name: str, package: Path) -> list[str]:
    """Return the figures of one package as a row of the table."""
    lengths = [len(file.read_text().splitlines()) for file in package.rglob("*.py") if file.read_text().strip()]
    at_top = [file for file in package.glob("*.py") if file.name != "__init__.py"]
    return [
        name,
        str(len(at_top)),
        str(sum(folder.is_dir() and any(folder.glob("*.py")) for folder in package.iterdir())),
        str(len(lengths)),
        f"{statistics.median(lengths):.0f}",
        str(max(lengths)),
        f"{relative_words(package):.1f}",
    ]


def downloaded(name: str, folder: Path) -> tuple[str, Path]:
    """Download and unpack the wheel of a neighbour; return its name with the version, and its package."""
    command = [sys.executable, "-m", "pip", "-qq", "download", "--no-deps", "--dest", str(folder / name), name]
    subprocess.run(command, check=True)
    (wheel,) = (folder / name).glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / name)
    return f"{name} {wheel.name.split('-')[1]}", folder / name / NEIGHBOURS[name]


def comparison() -> str:
    """Return the table of sparsify and its neighbours."""
    heading = ["package", "modules at the top", "packages in it", "files", "median lines", "longest", "relative words"]
    rows = [heading, row("sparsify", ROOT / "sparsify")]
    with tempfile.TemporaryDirectory() as folder:
        rows += [row(*downloaded(name, Path(folder))) for name in NEIGHBOURS]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(heading) + "|", *lines[1:]])


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    lines = comparison()
    if not options.write:
        print(lines)
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{lines}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()

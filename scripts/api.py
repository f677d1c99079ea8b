#!/usr/bin/env python
"""Write docs/api.md: every public name with its signature and docstring.

scripts/api.py            write the page
scripts/api.py --check    exit with 1 if the page is not current
"""

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

import sparsify

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
INTRO = """# Reference

Every public name of `sparsify`, written by `scripts/api.py` from signatures and docstrings. [guide.md](guide.md) has
the way through them, [glossary.md](glossary.md) the words.
"""
SECTIONS = {
    "From a dense model to a fast one": (
        "compress",
        "convert",
        "prune",
        "apply",
        "Reconstruction",
        "recover",
        "mix_data",
        "generate_data",
        "carry_over",
        "export",
        "to_dense",
        "masks_from_zeros",
    ),
    "Files and reports": ("save", "load", "save_pretrained", "from_pretrained", "SparsifyConfig", "report", "inspect"),
    "Recipes and training": ("load_recipe", "Recipe", "Schedule", "Pruner"),
    "Layers": ("SparseLinear", "SparseConv2d", "CSRLinear", "CSRConv2d"),
}
REST = "Errors and warnings"


def page() -> str:
    """Return the text of the page."""
    listed = {name for names in SECTIONS.values() for name in names}
    sections = SECTIONS | {REST: tuple(name for name in sparsify.__all__ if name not in listed)}
    parts = [INTRO]
    for title, names in sections.items():
        parts.append(f"## {title}\n")
        parts += [_entry(name) for name in names]
    return "\n".join(parts)


def _entry(name: str) -> str:
    thing = getattr(sparsify, name)
    lines = [f"### {name}\n", _signature(name, thing), _text(thing)]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        for key, member in vars(thing).items():
            function = getattr(member, "__func__", member)
            if not key.startswith("_") and inspect.isfunction(function) and function.__doc__:
                lines += [_signature(f"{name}.{key}", function), _text(function)]
    return "\n".join(lines)


def _signature(name: str, thing: Any) -> str:
    if isinstance(thing, type) and issubclass(thing, Exception):
        return f"```text\n{name}({thing.__mro__[1].__name__})\n```\n"
    parameters = [_parameter(p) for p in inspect.signature(thing).parameters.values()]
    keyword = [p.kind is p.KEYWORD_ONLY for p in inspect.signature(thing).parameters.values()]
    if True in keyword:
        parameters.insert(keyword.index(True), "*")
    one_line = f"{name}({', '.join(parameters)})"
    text = one_line if len(one_line) <= 100 else f"{name}(\n    " + ",\n    ".join(parameters) + ",\n)"
    return f"```text\n{text}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    annotation, default = parameter.annotation, parameter.default
    text = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
    if annotation is not parameter.empty:
        text += f": {annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)}"
    return text if default is parameter.empty else f"{text} = {default!r}"


def _text(thing: Any) -> str:
    """Return a docstring as Markdown, its examples as code."""
    blocks, code = [], False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line.startswith(">>>") and not code:
            blocks.append("```pycon")
            code = True
        elif code and not line.strip():
            blocks.append("```")
            code = False
        blocks.append(line)
    return "\n".join([*blocks, *(["```"] if code else []), ""])


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        print(f"{PAGE.name} is not current: run scripts/api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The zoo of architectures, and what must hold for each: scripts/zoo.py and tests/scripts/test_zoo.py go through it."""

from __future__ import annotations

import importlib
import importlib.util

import assets

from zoo_models.model import Model

#: The files here that hold models, and the packages that each needs.
FILES = {
    "plain": ("torch",),
    "vision": ("torchvision",),
    "language": ("transformers",),
    "pretrained": ("transformers", "tokenizers", "gguf"),
}
#: What scripts/assets.py has to have fetched for the last.
ASSETS = ("minilm", "smollm2")


def models(file: str) -> dict[str, Model]:
    """Return the models of a file by name. Raises ImportError where one of its packages is missing."""
    found: dict[str, Model] = importlib.import_module(f"zoo_models.{file}").MODELS
    return found


def why_missing(file: str) -> str:
    """Say what keeps the models of a file from being here; nothing if they are."""
    if gone := [package for package in FILES[file] if importlib.util.find_spec(package) is None]:
        return f"{gone[0]} is missing: pip install 'sparsify-torch[test]'"
    if file == "pretrained" and (gone := [name for name in ASSETS if assets.missing_files(name)]):
        return f".assets/{gone[0]} is missing: run scripts/assets.py"
    return ""

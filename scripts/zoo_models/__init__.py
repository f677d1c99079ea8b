"""The zoo of architectures and the checks of each, for scripts/zoo.py and tests/scripts/test_zoo.py."""

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
    "yolo": ("ultralytics", "cv2"),
    "pretrained": ("transformers", "tokenizers", "gguf"),
}
#: How to get them, if not with the tests' own; ultralytics asks for another torch.
INSTALL = {"yolo": "pip install --no-deps ultralytics opencv-python-headless"}
_INSTALL = "pip install 'sparsify-torch[test]'"
#: The folders of scripts/assets.py for the last of them.
ASSETS = ("minilm", "smollm2")


def models(file: str) -> dict[str, Model]:
    """Return the models of a file by name. Raises ImportError if one of its packages is missing."""
    found: dict[str, Model] = importlib.import_module(f"zoo_models.{file}").MODELS
    return found


def why_missing(file: str) -> str:
    """Return the reason why the models of a file cannot be built here, or ""."""
    if gone := [package for package in FILES[file] if importlib.util.find_spec(package) is None]:
        return f"{gone[0]} is missing: {INSTALL.get(file, _INSTALL)}"
    if file == "pretrained" and (gone := [name for name in ASSETS if assets.missing_files(name)]):
        return f".assets/{gone[0]} is missing: run scripts/assets.py"
    return ""

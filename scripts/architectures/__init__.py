"""The zoo: the architectures that scripts/zoo.py and tests/test_zoo.py go through, and what must hold for each."""

from __future__ import annotations

import importlib
import importlib.util

from architectures.model import Model

#: The file here that needs each package; what is not installed is left out.
FILES = {"torch": "plain", "torchvision": "vision", "transformers": "language"}


def models(package: str) -> dict[str, Model]:
    """Return the models of a package by name. Raises ImportError where the package is missing."""
    found: dict[str, Model] = importlib.import_module(f"architectures.{FILES[package]}").MODELS
    return found


def installed() -> list[str]:
    """Return the packages that are here."""
    return [package for package in FILES if importlib.util.find_spec(package) is not None]

"""Functions of other libraries replaced in every module that has imported them by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def rebind(module: ModuleType, name: str, make: Callable[[Any], Any]) -> None:
    """Exchange the function `name` of a module for `make(function)`, once, wherever it is bound by that name."""
    original = getattr(module, name)
    if hasattr(original, "of_sparsify"):
        return
    ours = make(original)
    ours.of_sparsify = True
    for other in list(sys.modules.values()):
        if vars(other).get(name) is original:
            setattr(other, name, ours)

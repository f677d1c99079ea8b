"""Eval mode for a model under calibration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def eval_without_cache(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, without the key-value cache of language models, and back."""
    training = [module for module in model.modules() if module.training]
    configs: dict[int, Any] = {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for module in training:
            module.training = True
        for config in caching:
            config.use_cache = True

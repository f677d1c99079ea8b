"""Hooks of accelerate on layers that are exchanged: a model on several devices has one on each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_hooks(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Take accelerate's hooks off layers that change inside the block, and put them on again."""
    hooked = {name: model.get_submodule(name) for name in names}
    hooked = {name: module for name, module in hooked.items() if hasattr(module, "_hf_hook")}
    if not hooked:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hooks = {module: module._hf_hook for module in hooked.values()}
    for module in hooks:
        remove_hook_from_module(module, recurse=True)
    yield
    for module, hook in hooks.items():
        add_hook_to_module(module, hook)

"""A check for the forward of a module: its class's own, or one put on the instance."""

from __future__ import annotations

from torch import nn


def check_forward(module: nn.Module) -> None:
    """Raise ValueError, with the reason, if a module's forward is not its class's own."""
    if hasattr(module, "_hf_hook"):
        raise ValueError(
            "accelerate has put a hook on it (device_map, offloading), which replaces its forward and may hold its "
            "weight; take the hooks off first, with accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    forward = module.__dict__.get("forward")  # accelerate's removal of its hooks leaves the class's own there
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        raise ValueError("its forward was replaced on the instance")

"""Layers as torch.fx and torch.jit meet them: one node of a graph, as torch's own layers are, or a refusal."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy, Tracer


def tracer_of(*args: Any) -> Tracer | None:
    """Return the torch.fx tracer that follows a call with these arguments, if one does."""
    found = next((arg.tracer for arg in args if isinstance(arg, Proxy)), None)
    return found if isinstance(found, Tracer) else None


def call_node(module: nn.Module, tracer: Tracer, *args: Any, **kwargs: Any) -> Any:
    """Record the call of a module inside a traced model as one node."""
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def refuse_script() -> None:
    """Raise RuntimeError: TorchScript compiles Python of its own kind, and ours is none."""
    raise RuntimeError(
        "a model with exported layers cannot be scripted; use torch.export or torch.compile, or script a copy with "
        "dense weights and zeros: sparsify.to_dense(copy.deepcopy(model))"
    )

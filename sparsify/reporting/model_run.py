"""A run of a whole model on inputs, and the first tensor of its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

#: Positional arguments of a model's forward, or keyword arguments.
Inputs = tuple[Any, ...] | dict[str, Any]


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a model's output: itself, or the first value of a tuple or dict."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output

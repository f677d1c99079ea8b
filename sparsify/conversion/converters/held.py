"""Weights that a module's own code reads for products other than those of one matrix: experts, einsum and bmm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import fx, nn

from sparsify.layers.functional_module import is_experts

_BATCHED = (torch.bmm, torch.matmul)
_BATCHED_METHODS = ("bmm", "matmul", "__matmul__")


def experts(module: nn.Module) -> dict[str, bool]:
    """Return the names of the Parameters (n_experts, ...) of a module of transformers' experts; empty for any other.

    Each comes with True if stored (n_experts, in_features, out_features).
    """
    if not is_experts(type(module)) or not isinstance(transposed := vars(module).get("is_transposed"), bool):
        return {}
    return {name: transposed for name, p in module._parameters.items() if p is not None and p.ndim == 3}


def held(parameters: Mapping[str, nn.Parameter], node: fx.Node) -> dict[str, bool]:
    """Return the Parameter that a node of a module's code multiplies by torch.einsum or as a batch of matrices.

    parameters: those of two or three dimensions, by their names in the code. The one returned comes with True if stored
    (..., in_features, out_features).
    """
    target: Any = node.target
    if node.op == "call_function" and target is torch.einsum:
        found = _of_einsum(node)
    elif (node.op == "call_function" and (target in _BATCHED or getattr(target, "__name__", "") == "matmul")) or (
        node.op == "call_method" and target in _BATCHED_METHODS
    ):
        found = {
            name: turned for name, turned in _of_batch(node).items() if getattr(parameters.get(name), "ndim", 0) == 3
        }
    else:
        found = {}
    return {name: turned for name, turned in found.items() if name in parameters}


def _of_einsum(node: fx.Node) -> dict[str, bool]:
    """Return the operand of an einsum that is an attribute with its sum over one of its last two dimensions.

    It may be summed over the first of three as well, as the outputs of experts are.
    """
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation:
        return {}
    inputs, _, output = equation.replace(" ", "").partition("->")
    found = {}
    for letters, operand in zip(inputs.split(","), operands, strict=False):
        summed = [place for place, letter in enumerate(letters) if letter not in output]
        shared = all(inputs.count(letters[place]) == 2 for place in summed)
        last = [place for place in summed if place >= len(letters) - 2]
        if _is_attribute(operand) and len(letters) in (2, 3) and letters.isalpha() and shared and len(last) == 1:
            found[str(operand.target)] = last[0] == len(letters) - 2
    return found


def _of_batch(node: fx.Node) -> dict[str, bool]:
    """Return the last operand of a product of matrices, if it is an attribute, turned or not."""
    weight: Any = node.args[-1] if node.args else None
    if _is_attribute(weight):
        return {str(weight.target): True}
    if not isinstance(weight, fx.Node) or not weight.args or not _is_attribute(weight.args[0]):
        return {}
    name, rest = getattr(weight.target, "__name__", weight.target), tuple(weight.args[1:])
    turns = (name in ("transpose", "swapaxes") and set(rest) in ({1, 2}, {-1, -2})) or (name, rest) == (
        "getattr",
        ("mT",),
    )
    return {str(weight.args[0].target): False} if turns else {}


def _is_attribute(node: Any) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "get_attr"

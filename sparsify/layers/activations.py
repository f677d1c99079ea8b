"""Calls of torch's functions that are activations of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_IN_PLACE = {torch.relu_: "relu", Tensor.relu_: "relu", "relu_": "relu"}
#: Functions with a second argument, inplace.
_FUNCTIONS = {F.relu: "relu", F.silu: "silu", F.hardswish: "hardswish", F.relu6: "relu6"}
_PLAIN = {torch.relu: "relu", Tensor.relu: "relu", "relu": "relu", **_IN_PLACE}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def activation_call(
    function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str | None, bool]:
    """Return the kernels' name of a call, None for one that is no activation of theirs, and whether it works in place.

    function: a function, or the name of a method of a tensor. args, kwargs: what the call has beside its tensor.

    >>> activation_call(F.gelu, (), {"approximate": "tanh"}), activation_call(F.hardtanh, (0, 6), {"inplace": True})
    (('gelu_tanh', False), ('relu6', True))
    """
    options = {key: value for key, value in kwargs.items() if key != "input"}
    if function is F.hardtanh:
        bounds = dict(zip(("min_val", "max_val", "inplace"), args, strict=False)) | options
        is_relu6 = (bounds.pop("min_val", -1), bounds.pop("max_val", 1)) == (0, 6) and not bounds.keys() - {"inplace"}
        return "relu6" if is_relu6 else None, bool(bounds.get("inplace"))
    in_place = bool(args[0] if args and function in _FUNCTIONS else options.pop("inplace", function in _IN_PLACE))
    if function is F.gelu:
        name = _GELU.get(options.pop("approximate", "none"))
    else:
        name = _FUNCTIONS.get(function) or _PLAIN.get(function)  # type: ignore[arg-type]
    known = not options and len(args) <= int(function in _FUNCTIONS)
    return name if known else None, in_place

"""The hooks of torchao and optimum-quanto: they round nn.Linear, and would skip or break the layers of ours.

torchao passes exported layers by in silence, and puts a tensor without `where` under a mask; quanto passes exported
layers by. Both refuse now. quanto rounds masked layers: the zeros stay, the mask goes.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from sparsify.integrations.rebinding import rebind
from sparsify.layers import MaskedLayer, PackedLayer

_TORCHAO, _QUANTO = "torchao.quantization.quant_api", "optimum.quanto.quantize"


def register() -> None:
    """Let the functions of those libraries that are imported refuse, once."""
    if _TORCHAO in sys.modules:
        rebind(sys.modules[_TORCHAO], "quantize_", _torchao)
    if _QUANTO in sys.modules and hasattr(sys.modules[_QUANTO], "quantize"):
        rebind(sys.modules[_QUANTO], "quantize", _quanto)


def _torchao(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def quantize_(model: nn.Module, config: Any, filter_fn: Any = None, *args: Any, **kwargs: Any) -> Any:
        named = model.named_modules()
        ours = ((name, layer) for name, layer in named if isinstance(layer, (MaskedLayer, PackedLayer)))
        _refuse("torchao", ((n, layer) for n, layer in ours if filter_fn is None or filter_fn(layer, n)))
        return original(model, config, filter_fn, *args, **kwargs)

    return quantize_


def _quanto(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def quantize(model: nn.Module, *args: Any, include: Any = None, exclude: Any = None, **kwargs: Any) -> Any:
        chosen = (
            (name, layer)
            for name, layer in model.named_modules()
            if (include is None or _matches(name, include)) and (exclude is None or not _matches(name, exclude))
        )
        _refuse("quanto", ((name, layer) for name, layer in chosen if _lost_by_quanto(layer)))
        return original(model, *args, include=include, exclude=exclude, **kwargs)

    return quantize


def _lost_by_quanto(layer: nn.Module) -> bool:
    return isinstance(layer, PackedLayer) or (isinstance(layer, MaskedLayer) and layer.hides_values())


def _refuse(library: str, layers: Iterator[tuple[str, nn.Module]]) -> None:
    for name, layer in layers:
        kind = "masked" if isinstance(layer, MaskedLayer) else "exported"
        raise ValueError(
            f"{name or '(root)'}: {library} cannot round this {kind} layer; sparsify.export(model, quantize='int8') "
            "rounds the kept weights, and sparsify.to_dense(model) gives plain layers, with zeros"
        )


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))

"""The hooks of peft: no adapter is merged into the weight of a masked or exported layer.

The mask would drop the part of the change at removed weights, and a packed weight cannot be written to. Every tuner
of peft asks the same function for the adapters to be merged, before it changes a layer; the function refuses. The
methods for whole models refuse before they change the first layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft.tuners import tuners_utils

from sparsify.integrations.rebinding import rebind
from sparsify.layers import MaskedLayer, PackedLayer


def register() -> None:
    """Let the functions refuse, once."""
    rebind(tuners_utils, "check_adapters_to_merge", _of_layer)
    base: Any = tuners_utils.BaseTuner
    if not hasattr(base.merge_adapter, "of_sparsify"):
        base.merge_adapter = _of_model(base.merge_adapter, always=True)
        base._unload_and_optionally_merge = _of_model(base._unload_and_optionally_merge, always=False)


def _check(name: str, layer: Any) -> None:
    """Raise ValueError, with the way out, if nothing can be merged into a layer of peft."""
    base = layer.get_base_layer()
    if isinstance(base, MaskedLayer) and not bool(base.mask.all()):
        raise ValueError(
            f"{name}the adapter changes weights that the mask of its layer removes, and merging would lose that part: "
            "keep the adapter unmerged, or merge into a dense model (sparsify.to_dense(model)) and prune again"
        )
    if isinstance(base, PackedLayer):
        raise ValueError(
            f"{name}the weight of an exported layer is packed, and no adapter can be merged into it: keep the adapter "
            "unmerged, or merge into a dense model (sparsify.to_dense(model)), prune and export again"
        )


def _of_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def check_adapters_to_merge(module: Any, *args: Any, **kwargs: Any) -> Any:
        _check("", module)
        return original(module, *args, **kwargs)

    return check_adapters_to_merge


def _of_model(original: Callable[..., Any], *, always: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        if always or kwargs.get("merge", args[0] if args else True):
            for name, module in self.model.named_modules():
                if isinstance(module, tuners_utils.BaseTunerLayer):
                    _check(f"{name}: ", module)
        return original(self, *args, **kwargs)

    merge.of_sparsify = True  # type: ignore[attr-defined]
    return merge

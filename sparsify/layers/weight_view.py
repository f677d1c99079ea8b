"""WeightView: what `CSRLinear.weight` gives to code that wants a Linear's weight.

Much code looks at a weight's dtype or device, and some calls F.linear(x, layer.weight, layer.bias) instead of the
layer (the windowed attention of torchvision's Swin, for one). The view answers the first without unpacking anything,
runs the second on the layer's own kernel, and for everything else becomes the dense weight it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

#: What can be said of the weight without unpacking it.
_CHEAP = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "is_sparse", "is_quantized", "grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "is_floating_point", "__len__")),
}


class WeightView(Tensor):
    """A weight (out_features, in_features) that is not in memory; see this file's docstring."""

    run_sparse: Callable[[Tensor, Tensor | None], Tensor]
    unpack: Callable[[], Tensor]

    @staticmethod
    def make(
        values: Tensor,
        shape: tuple[int, int],
        run_sparse: Callable[[Tensor, Tensor | None], Tensor],
        unpack: Callable[[], Tensor],
    ) -> WeightView:
        """Make a view of a weight of the dtype and device of `values`: run_sparse(x, bias) uses it, unpack() is it."""
        view: WeightView = Tensor._make_wrapper_subclass(WeightView, shape, dtype=values.dtype, device=values.device)
        view.run_sparse, view.unpack = run_sparse, unpack
        return view

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer, run sparse, or unpack; refuse to be changed, which would change only what was unpacked."""
        kwargs = dict(kwargs or {})
        if _writes(func) and args and isinstance(args[0], WeightView):
            raise RuntimeError(  # not a TypeError: Python's operators take that for "try the other operand"
                "the weight of an exported layer is packed and cannot be changed in place; change it in the masked "
                "model and export again, or unpack this one with sparsify.to_dense(model)"
            )
        if func in _CHEAP:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.linear:
            named = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            if isinstance(named["weight"], WeightView) and not isinstance(named["input"], WeightView):
                return named["weight"].run_sparse(named["input"], named.get("bias"))
        return _on_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Unpack: this is reached only by calls from below Python."""
        return _on_dense(func, args, dict(kwargs or {}))


def _writes(func: Callable[..., Any]) -> bool:
    """Say whether a function changes its first argument, going by torch's naming: add_ (of += too), __setitem__."""
    name = func.__name__
    return (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__")


def _on_dense(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with every view unpacked."""
    dense_args, dense_kwargs = tree_map_only(WeightView, lambda view: view.unpack(), (args, kwargs))
    return func(*dense_args, **dense_kwargs)

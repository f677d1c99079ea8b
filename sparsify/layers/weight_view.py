"""WeightView: the value of `CSRLinear.weight`, for code written for nn.Linear.

Much code looks at a weight's dtype or device, and some calls F.linear(x, layer.weight, layer.bias) instead of the
layer (the windowed attention of torchvision's Swin, for one). The view answers the first without unpacking anything,
runs the second on the layer's own kernel, and becomes the dense weight for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

#: Functions of the weight that need no unpacking.
_CHEAP = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "is_sparse", "is_quantized", "grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "is_floating_point", "__len__")),
}


#: Products with a transposed weight at the end: (input, weight), or (bias, input, weight).
_MULTIPLY = {torch.matmul, torch.mm, torch.addmm, Tensor.matmul, Tensor.mm, Tensor.addmm, Tensor.__matmul__}

_TURNED = {Tensor.t, Tensor.T.__get__, Tensor.mT.__get__, torch.t}  # type: ignore[attr-defined]
_TURNED_ALONG = {Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.swapaxes, torch.swapaxes}


class WeightView(Tensor):
    """A weight (out_features, in_features) without dense memory; see this file's docstring.

    Its transpose is a view too, `turned`, and sparse as the right factor of a product.
    """

    run_sparse: Callable[[Tensor, Tensor | None], Tensor]
    unpack: Callable[[], Tensor]
    turned: bool

    @staticmethod
    def make(
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        run_sparse: Callable[[Tensor, Tensor | None], Tensor],
        unpack: Callable[[], Tensor],
    ) -> WeightView:
        """Make a view of a weight.

        run_sparse(x, bias): multiply with the weight.
        unpack(): return the dense weight.
        """
        view: WeightView = Tensor._make_wrapper_subclass(WeightView, shape, dtype=dtype, device=device)
        view.run_sparse, view.unpack, view.turned = run_sparse, unpack, False
        return view

    def turn(self) -> WeightView:
        """Return the transpose of this view."""
        shape = (self.size(1), self.size(0))
        view = WeightView.make(shape, self.dtype, self.device, self.run_sparse, lambda: self.unpack().t())
        view.turned = not self.turned
        return view

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer, run sparse, or unpack; refuse a write, as it would change only an unpacked copy."""
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
            weight = named["weight"]
            if isinstance(weight, WeightView) and not weight.turned and not isinstance(named["input"], WeightView):
                return weight.run_sparse(named["input"], named.get("bias"))
        if _transposes(func, args, kwargs):
            view: WeightView = args[0]
            return view.turn()
        if func in _MULTIPLY and not kwargs:
            *bias, input, weight = args
            if isinstance(weight, WeightView) and weight.turned and _rows(input) and all(_vector(b) for b in bias):
                return weight.run_sparse(input, *bias or (None,))
        return _on_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Unpack, for calls from below Python."""
        return _on_dense(func, args, dict(kwargs or {}))


def _transposes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call transposes a view."""
    if not args or not isinstance(args[0], WeightView) or kwargs:
        return False
    along = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    permutes = func in (Tensor.permute, torch.permute)
    return func in _TURNED or (
        func in _TURNED_ALONG and [axis % 2 for axis in along] in ([[1, 0]] if permutes else [[0, 1], [1, 0]])
    )


def _rows(input: Any) -> bool:
    """Return whether `input` is a plain tensor of rows."""
    return isinstance(input, Tensor) and not isinstance(input, WeightView) and input.ndim > 0


def _vector(bias: Any) -> bool:
    return isinstance(bias, Tensor) and not isinstance(bias, WeightView) and bias.ndim == 1


def _writes(func: Callable[..., Any]) -> bool:
    """Return whether a function changes its first argument, by torch's naming: add_ (of += too), __setitem__."""
    name = func.__name__
    return (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__")


def _on_dense(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with every view unpacked."""
    dense_args, dense_kwargs = tree_map_only(WeightView, lambda view: view.unpack(), (args, kwargs))
    return func(*dense_args, **dense_kwargs)

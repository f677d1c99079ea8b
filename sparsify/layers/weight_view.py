"""WeightView: the value of `CSRLinear.weight`, for code written for nn.Linear; StackView, for several in one Parameter.

Much code looks at a weight's dtype or device, and some calls F.linear(x, layer.weight, layer.bias) instead of the
layer (the windowed attention of torchvision's Swin, for one). The view answers the first without unpacking anything,
runs the second on the layer's own kernel, and becomes the dense weight for everything else. torch's operators of LSTMs
and their like run product by product with it (recurrent_products.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sparsify.layers.recurrent_products import CELLS, LAYERS, recurrent

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
        _refuse_writes(func, args)
        if func in _CHEAP:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.linear:
            named = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            weight = named["weight"]
            if isinstance(weight, WeightView) and not weight.turned and not isinstance(named["input"], WeightView):
                return weight.run_sparse(named["input"], named.get("bias"))
        if (func in LAYERS or func in CELLS) and not kwargs:
            return recurrent(func, args)
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


class StackView(Tensor):
    """Several weights in one tensor, (n, rows, columns), without dense memory: each is a WeightView.

    Indexed with one number it gives that weight's view; any other use unpacks.
    """

    matrix: Callable[[int], WeightView]
    unpack: Callable[[], Tensor]

    @staticmethod
    def make(
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        matrix: Callable[[int], WeightView],
        unpack: Callable[[], Tensor],
    ) -> StackView:
        """Make a view of a stack of weights; matrix(number): the view of one of them."""
        view: StackView = Tensor._make_wrapper_subclass(StackView, shape, dtype=dtype, device=device)
        view.matrix, view.unpack = matrix, unpack
        return view

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer, pick a weight, or unpack; refuse a write."""
        _refuse_writes(func, args)
        if func in _CHEAP:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        if func is Tensor.__getitem__ and isinstance(args[0], StackView) and args[0].dim() == 3 and _is_number(args[1]):
            return args[0].matrix(range(args[0].size(0))[int(args[1])])
        return _on_dense(func, args, dict(kwargs or {}))

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


def _is_number(index: Any) -> bool:
    """Return whether an index picks one entry of the first dimension."""
    if isinstance(index, Tensor):
        return index.dim() == 0 and index.dtype in (torch.int64, torch.int32)
    return isinstance(index, int) and not isinstance(index, bool)


def _refuse_writes(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise RuntimeError for a function that changes a view in place."""
    if _writes(func) and args and isinstance(args[0], (WeightView, StackView)):
        raise RuntimeError(  # not a TypeError: Python's operators take that for "try the other operand"
            "the weight of an exported layer is packed and cannot be changed in place; change it in the masked "
            "model and export again, or unpack this one with sparsify.to_dense(model)"
        )


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
    dense_args, dense_kwargs = tree_map_only((WeightView, StackView), lambda view: view.unpack(), (args, kwargs))
    return func(*dense_args, **dense_kwargs)

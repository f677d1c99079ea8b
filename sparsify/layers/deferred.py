"""Deferred outputs: computed at their first use, by the kernel with the activation if this use is an activation.

A layer cannot know the use of its output: the module around it may be sliced, hooked or told to return features. So a
layer followed by an activation returns a DeferredOutput while its module runs. An activation gets its result in one
pass over memory, or is deferred as well if a layer reads it: two layers are then one call (`layers/csr_linear.py`). Any
other use finds the plain output. Nothing is left to defer once the module ends, or, if it passes its output on to the
module around it, once that ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsify.kernels.observers import is_transformed
from sparsify.layers.activations import activation_call

#: Below so many outputs a pass of its own over them costs less than deferring them.
FEWEST_OUTPUTS = 4096

#: Questions about an output that need no output.
_CHEAP = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__len__")),
}


class _Runs(threading.local):
    """The modules that run in this thread, innermost last, each with the outputs deferred in it."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, list[weakref.ref[DeferredOutput]]]] = []


_RUNS = _Runs()


def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Let the layers of a module defer their outputs from now on: a forward pre-hook."""
    if not torch.compiler.is_compiling():
        # A run of this module that is still there was interrupted.
        _RUNS.stack = [*(run for run in _RUNS.stack if run[0] is not module), (module, [])]


def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Compute the deferred outputs of a module's run that are still referenced: a forward hook.

    Returns the module's output without deferred ones, or None for one that has none.
    """
    if torch.compiler.is_compiling():
        return None
    for deferred in _end_run(module):
        if output is not None:  # there is none if the module failed
            deferred.settle()
    if not any(isinstance(leaf, DeferredOutput) for leaf in tree_leaves(output)):
        return None
    return tree_map_only(DeferredOutput, lambda deferred: deferred.settle(), output)


def pass_on(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """End a module's run as `end` does, but leave its output deferred if that of the module around it runs."""
    around = [run for run in _RUNS.stack if run[0] is not module]
    if type(output) is not DeferredOutput or not around or module not in around[-1][0]._modules.values():
        return end(module, args, output)
    for deferred in _end_run(module):
        if deferred is not output:
            deferred.settle()
    _RUNS.stack[-1][1].append(weakref.ref(output))
    return None


def _end_run(module: nn.Module) -> list[DeferredOutput]:
    """Take a module's run off the stack; return its deferred outputs that are still referenced."""
    ended = [run for run in _RUNS.stack if run[0] is module]
    _RUNS.stack = [run for run in _RUNS.stack if run[0] is not module]
    return [deferred for _, outputs in ended for reference in outputs if (deferred := reference()) is not None]


def unfuse_activations(model: nn.Module) -> None:
    """Let layers give plain outputs, in place, and take their two hooks off modules."""
    for module in model.modules():
        if getattr(module, "followed_by", "none") != "none":
            module.followed_by = "none"  # type: ignore[assignment]  # a string, of a PackedLayer
            module.feeds_linear = False  # type: ignore[assignment]
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (begin, end, pass_on)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def may_defer(layer: nn.Module, input: Tensor, n_outputs: int) -> bool:
    """Return whether a layer of the running module may defer this output: a large one, in inference."""
    return (
        n_outputs >= FEWEST_OUTPUTS
        and bool(_RUNS.stack)
        and not torch.is_grad_enabled()
        and not layer._forward_hooks
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not is_transformed()
    )


class DeferredOutput(Tensor):
    """The output of a layer, or of the activation after it, before anybody has used it; see this file's docstring."""

    layer: nn.Module | None  # whose output it is; None if that of two layers
    compute: Callable[[str], Tensor]
    input: Tensor
    activation: str
    version: int | None
    value: Tensor | None

    @staticmethod
    def make(
        layer: nn.Module | None, compute: Callable[[str], Tensor], input: Tensor, shape: Sequence[int]
    ) -> DeferredOutput:
        """Defer `compute`, which takes the name of an activation, of an input: an output of this shape.

        layer: the only layer between input and output, if the next one may be computed together with that.
        """
        version = None if input.is_inference() else input._version
        return DeferredOutput._make(layer, compute, input, shape, "none", version)

    @staticmethod
    def _make(
        layer: nn.Module | None,
        compute: Callable[[str], Tensor],
        input: Tensor,
        shape: Sequence[int],
        activation: str,
        version: int | None,
    ) -> DeferredOutput:
        made: DeferredOutput = Tensor._make_wrapper_subclass(
            DeferredOutput, shape, dtype=input.dtype, device=input.device
        )
        made.layer, made.compute, made.input, made.activation = layer, compute, input, activation
        made.version, made.value = version, None
        _RUNS.stack[-1][1].append(weakref.ref(made))
        return made

    def activated(self, activation: str) -> DeferredOutput:
        """Return the output with an activation, deferred as well."""
        return self._make(self.layer, self.compute, self.input, self.shape, activation, self.version)

    def settle(self) -> Tensor:
        """Return the output, from now on the same tensor."""
        if self.value is None:
            self.value = self.computed_with(self.activation)
        return self.value

    def computed_with(self, activation: str) -> Tensor:
        """Compute the layer's output with an activation; raise as `current_input` does."""
        self.current_input()
        return self.compute(activation)

    def current_input(self) -> Tensor:
        """Return the layer's input. Raises RuntimeError if it was changed in place meanwhile."""
        if self.version is not None and self.version != self.input._version:
            raise RuntimeError(
                "the input of an exported layer was changed in place before its output was used; copy the input, "
                "or use the output first"
            )
        return self.input

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer, compute together with an activation, or use the plain output."""
        kwargs = dict(kwargs or {})
        if func in _CHEAP:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        output = args[0] if args else kwargs.get("input")
        if isinstance(output, DeferredOutput) and output.value is None:
            if func is F.dropout and not kwargs.get("training", True):
                return output
            name, is_in_place = activation_call(func, args[1:], kwargs)
            if name is not None and output.activation == "none":
                if getattr(output.layer, "feeds_linear", False) and not is_in_place:
                    return output.activated(name)
                activated = output.computed_with(name)
                if is_in_place:
                    output.value = activated
                return activated
        return _on_value(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Use the plain output: only calls from below Python arrive here."""
        return _on_value(func, args, dict(kwargs or {}))


def _on_value(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with plain outputs."""
    plain_args, plain_kwargs = tree_map_only(DeferredOutput, lambda deferred: deferred.settle(), (args, kwargs))
    return func(*plain_args, **plain_kwargs)

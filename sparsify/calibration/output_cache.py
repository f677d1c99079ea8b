"""The output cache: finished layers, and attention between them, repeat stored outputs instead of running again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsify.calibration.activation_store import MemoryBudget

_DEFAULT_BYTES = 2**30  # without a budget


@contextlib.contextmanager
def override_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of one module inside the block."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class OutputCache:
    """Stored outputs, by batch, of finished layers: those with one call in each batch and no more changes to come.

    Outputs are stored while the budget has room (None: 1 GiB); others are computed again each time, to the same bits.
    """

    def __init__(self, model: nn.Module, budget: MemoryBudget | None) -> None:
        self._model, self.budget = model, budget or MemoryBudget(_DEFAULT_BYTES)
        self._outputs: dict[str, dict[int, Tensor]] = {}

    def add(self, names: Iterable[str]) -> None:
        """Add finished layers."""
        self._outputs |= {name: {} for name in names}

    def forget(self, names: Iterable[str]) -> None:
        """Drop layers of no further use, and give their memory back."""
        for name in names:
            self.budget.give_back(sum(output.nbytes for output in self._outputs.pop(name, {}).values()))

    @contextlib.contextmanager
    def overriding_forwards(self, number: int, *, last: bool = False) -> Iterator[None]:
        """Let the layers return their stored outputs for batch `number`; new ones are stored unless it is the last run.

        The layers' own forwards are back after the block.
        """
        with contextlib.ExitStack() as overrides:
            for name, outputs in self._outputs.items():
                module = self._model.get_submodule(name)
                cached = _CachedForward(module.forward, outputs, number, None if last else self.budget)
                overrides.enter_context(override_forward(module, cached))
            yield

    def __enter__(self) -> OutputCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.forget(list(self._outputs))


@dataclass(frozen=True)
class _CachedForward:
    """The forward of a finished layer on one batch; without a budget it stores no new output."""

    compute: Callable[..., Any]
    outputs: dict[int, Tensor]
    number: int
    budget: MemoryBudget | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.number in self.outputs:
            return self.outputs[self.number].clone()  # the model may write into it
        output = self.compute(*args, **kwargs)
        if self.budget is not None and isinstance(output, Tensor) and self.budget.take(output.nbytes):
            self.outputs[self.number] = output.clone()
        return output


class AttentionCache:
    """Stored outputs, by batch, of the calls of scaled_dot_product_attention in a block, in order.

    A run that ends at a layer with no change yet stores those it comes by: all layers before are finished. Later runs
    of the batch repeat them. Without room in the budget, this call and those after it are computed each time.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self._outputs: dict[int, list[Tensor]] = {}

    def repeating(self, number: int, *, storing: bool) -> TorchFunctionMode:
        """Return a context in which attention repeats its outputs of batch `number`, and stores new ones if asked."""
        return _RepeatedAttention(self._outputs.setdefault(number, []), self.budget if storing else None)

    def forget(self) -> None:
        """Drop all outputs: those of a block at its end, or before its layers change once more."""
        self.budget.give_back(sum(output.nbytes for outputs in self._outputs.values() for output in outputs))
        self._outputs.clear()


class _RepeatedAttention(TorchFunctionMode):
    """Calls of scaled_dot_product_attention in one run, the first ones from `stored`."""

    def __init__(self, stored: list[Tensor], budget: MemoryBudget | None) -> None:
        super().__init__()
        self.stored, self.budget, self.n_calls = stored, budget, 0

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.n_calls += 1
        if self.n_calls <= len(self.stored):
            return self.stored[self.n_calls - 1].clone()  # the model may write into it
        output = func(*args, **(kwargs or {}))
        next_one = self.n_calls == len(self.stored) + 1
        if next_one and self.budget is not None and self.budget.take(output.nbytes):
            self.stored.append(output.clone())
        return output

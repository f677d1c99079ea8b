"""The output cache: finished layers repeat their stored outputs, instead of running again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

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
        self._model, self._budget = model, budget or MemoryBudget(_DEFAULT_BYTES)
        self._outputs: dict[str, dict[int, Tensor]] = {}

    def add(self, names: Iterable[str]) -> None:
        """Add finished layers."""
        self._outputs |= {name: {} for name in names}

    def forget(self, names: Iterable[str]) -> None:
        """Drop layers of no further use, and give their memory back."""
        for name in names:
            self._budget.give_back(sum(output.nbytes for output in self._outputs.pop(name, {}).values()))

    @contextlib.contextmanager
    def overriding_forwards(self, number: int, *, last: bool = False) -> Iterator[None]:
        """Let the layers return their stored outputs for batch `number`; new ones are stored unless it is the last run.

        The layers' own forwards are back after the block.
        """
        with contextlib.ExitStack() as overrides:
            for name, outputs in self._outputs.items():
                module = self._model.get_submodule(name)
                cached = _CachedForward(module.forward, outputs, number, None if last else self._budget)
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

"""Modules that compute something else for a while, such as layers that hand out what they have computed before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from sparsify.calibration.activation_store import MemoryBudget

_ROOM = 2**30  # bytes, where there is no budget


@contextlib.contextmanager
def override_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class OutputCache:
    """Layers that run once on each batch and will not change any more: what they compute is kept, and not done again.

    Outputs are kept while the budget has room (None: 1 GiB); the others are computed again each time, to the same bits.
    """

    def __init__(self, model: nn.Module, budget: MemoryBudget | None) -> None:
        self._model, self._budget = model, budget or MemoryBudget(_ROOM)
        self._outputs: dict[str, dict[int, Tensor]] = {}

    def add(self, names: Iterable[str]) -> None:
        """Say which layers are finished, besides those that were."""
        self._outputs |= {name: {} for name in names}

    def forget(self, names: Iterable[str]) -> None:
        """Give back the room that layers take which will not be asked again."""
        for name in names:
            self._budget.give_back(sum(output.nbytes for output in self._outputs.pop(name, {}).values()))

    @contextlib.contextmanager
    def overriding_forwards(self, number: int, *, last: bool = False) -> Iterator[None]:
        """Let the layers hand out what they have computed for the `number`-th batch, and keep it unless it is last."""
        with contextlib.ExitStack() as stand_ins:
            for name, outputs in self._outputs.items():
                module = self._model.get_submodule(name)
                forward = self._kept(module.forward, outputs, number, last)
                stand_ins.enter_context(override_forward(module, forward))
            yield

    def _kept(
        self, compute: Callable[..., Any], outputs: dict[int, Tensor], number: int, last: bool
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if number in outputs:
                return outputs[number].clone()  # the model may write into it
            output = compute(*args, **kwargs)
            if not last and isinstance(output, Tensor) and self._budget.take(output.nbytes):
                outputs[number] = output.clone()
            return output

        return forward

    def __enter__(self) -> OutputCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.forget(list(self._outputs))

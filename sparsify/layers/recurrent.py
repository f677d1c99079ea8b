"""Recurrent: the mixin of LSTMs, GRUs and RNNs whose matrices are layers; torch's fused operators compute."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_Here = threading.local()


class Recurrent(nn.Module):
    """An nn.RNNBase that reads the weights of its layers at each call.

    torch keeps its Parameters in a list for the fused operators. Here the list is made when it is read, of weights
    under their masks: in eval mode the Parameters themselves, which stay in one piece of memory for cuDNN. With packed
    weights, and for hooks of its layers, a call runs product by product (recurrent_products.py).
    """

    _flat_weights_names: list[str]
    _flat_weight_refs: list[Any]

    @property
    def _flat_weights(self) -> list[Tensor]:
        """The weights and biases in torch's order, under their masks."""
        if getattr(_Here, "reads_parameters", False):
            return [self._parameter(name) for name in self._flat_weights_names]
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor]) -> None:
        """Ignore torch's own list."""

    def check_input(self, *args: Any) -> None:
        """Check the dtype and shape of an input, as torch's class does."""
        with _reading_parameters():
            super().check_input(*args)  # type: ignore[misc]

    def flatten_parameters(self) -> None:
        """Let cuDNN have the Parameters in one piece of memory, where it runs, unless some are packed."""
        if any("weight" not in layer._parameters for layer in self._modules.values() if layer is not None):
            return
        with _reading_parameters():
            super().flatten_parameters()  # type: ignore[misc]

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []
        self.flatten_parameters()

    def _weights_have_changed(self) -> bool:
        return False

    def _parameter(self, name: str) -> Tensor:
        """Return the Parameter behind a weight or bias."""
        held = self._modules.get(f"{name}_layer")
        if held is not None and "weight" not in held._parameters:  # packed: a view
            return held.weight  # type: ignore[return-value]
        found = self._parameters[name] if held is None else held._parameters["weight"]
        assert found is not None
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or pickle, without torch's references to Parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._flat_weight_refs = []


@contextlib.contextmanager
def _reading_parameters() -> Iterator[None]:
    """Let this thread read Parameters in the place of weights under masks: their dtype and memory."""
    _Here.reads_parameters = True
    try:
        yield
    finally:
        _Here.reads_parameters = False

"""Runs of a model for calibration: cut short at a layer, and with finished chains of blocks bypassed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.activation_store import SpillingTensorList
from sparsify.calibration.batches import Batch
from sparsify.calibration.block_call import BlockCall, hidden_state, split_hidden
from sparsify.calibration.output_cache import OutputCache, override_forward


class StopForward(BaseException):
    """The end of a run at a layer, with the rest of the model left out.

    No `except Exception` in the model's own code catches it; hooks registered with always_call=True do run.
    """


def run_module(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a model or a part of it without gradients, to the end or to a StopForward; return its output."""
    with torch.inference_mode(False), torch.no_grad(), contextlib.suppress(StopForward):
        return module(*args, **kwargs)


class ModelReplay:
    """Runs of the whole model on its batches, with finished chains bypassed and finished layers cached.

    In a bypassed chain each block returns the hidden state that it gets, and the last block the chain's output stored
    in `finals`. `outputs` has the outputs of blocks without their hidden states.
    """

    def __init__(
        self, model: nn.Module, outputs: Mapping[str, BlockCall], batches: Sequence[Batch], cache: OutputCache
    ) -> None:
        self.model, self.outputs, self.batches, self.cache = model, outputs, batches, cache
        self.finals: dict[tuple[str, ...], SpillingTensorList | list[Tensor]] = {}

    def run(self, number: int) -> None:
        """Run the model on batch `number`."""
        batch = self.batches[number]
        with contextlib.ExitStack() as overrides:
            for chain, finals in self.finals.items():
                for name in chain:
                    forward = _Bypass(self.outputs[name], finals[number] if name == chain[-1] else None)
                    overrides.enter_context(override_forward(self.model.get_submodule(name), forward))
            with self.cache.overriding_forwards(number):
                run_module(self.model, batch.args, batch.kwargs)

    def chain_arguments(self, chain: tuple[str, ...], number: int) -> tuple[Tensor, dict[str, BlockCall]] | None:
        """Return a chain's first hidden state in batch `number`, and the other arguments of each of its blocks.

        None if this batch does not reach all of them: a router sends its tokens elsewhere. No block runs: `trace_model`
        has checked that the arguments depend on no hidden state.
        """
        capture = _ChainCapture(chain, self.outputs)
        with contextlib.ExitStack() as overrides:
            for name in chain:
                forward = functools.partial(capture.forward, name)
                overrides.enter_context(override_forward(self.model.get_submodule(name), forward))
            self.run(number)
        return (capture.hidden[0], capture.calls) if capture.calls.keys() == set(chain) else None


@dataclass(frozen=True)
class _Bypass:
    """The forward of a bypassed block: returns its hidden state, or the stored one of the chain."""

    output: BlockCall
    final: Tensor | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output.fill(hidden_state((args, kwargs)) if self.final is None else self.final)


class _ChainCapture:
    """The calls of a chain's blocks, captured in a run without the blocks; it ends at the last one."""

    def __init__(self, chain: tuple[str, ...], outputs: Mapping[str, BlockCall]) -> None:
        self.chain, self.outputs = chain, outputs
        self.hidden: list[Tensor] = []
        self.calls: dict[str, BlockCall] = {}

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Store the call of the block `name`, and pass its hidden state on."""
        parts = split_hidden((args, kwargs))
        assert parts is not None
        hidden, self.calls[name] = parts
        self.hidden.append(hidden)
        if name == self.chain[-1]:
            raise StopForward
        return self.outputs[name].fill(hidden)

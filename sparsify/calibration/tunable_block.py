"""A block of a chain with its layers pruned, to be tuned: its inputs, and the outputs wanted of it, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsify.calibration.activation_store import SpillingTensorList
from sparsify.calibration.batches import input_rows
from sparsify.calibration.block_call import BlockCall, hidden_state


@dataclass(frozen=True)
class TunableBlock:
    """A block with all of its layers pruned, and none of those behind it.

    layers: the names of its calibrated layers
    calls: its arguments without the hidden state, for each batch of this process
    inputs: its hidden states, from the blocks before as they are now
    targets: its outputs in the dense model, on the hidden states there
    counts: takes a batch's number and the leading dimensions of an output; returns a bool for each row, False =
        padding, or None for all
    """

    name: str
    module: nn.Module
    layers: tuple[str, ...]
    calls: Sequence[BlockCall]
    inputs: SpillingTensorList
    targets: SpillingTensorList
    counts: Callable[[int, Sequence[int]], Tensor | None]

    def __len__(self) -> int:
        return len(self.calls)

    def run(self, number: int) -> tuple[Tensor, Tensor]:
        """Run a batch; return the rows of the output and the wanted ones, (rows, features) in float32 at least."""
        args, kwargs = self.calls[number].fill(self.inputs[number])
        output = hidden_state(self.module(*args, **kwargs))
        counts = self.counts(number, output.shape[:-1])
        found, wanted = (_wide(input_rows(tensor, counts)) for tensor in (output, self.targets[number]))
        return found, wanted


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()

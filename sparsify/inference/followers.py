"""Steps after a convolution, a BatchNorm and an activation, that a packed layer runs in the same call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sparsify.conversion.converters.table import packed_type
from sparsify.conversion.module_surgery import copy_replacing
from sparsify.inference.fusion import fuse_activations
from sparsify.layers import MaskedLayer
from sparsify.layers.csr_convolution import CSRConvolution
from sparsify.layers.fused_block import FusedCall, fused_calls


class Followed(nn.Module):
    """A layer with the steps after it, in one call of a kernel if the layer is packed and the kernel takes the inputs.

    A sum and a pool among the steps are left out.
    """

    def __init__(self, layer: nn.Module, steps: FusedCall) -> None:
        """Let the steps follow another layer than their own."""
        super().__init__()
        self.layer, self.norm = layer, steps.norm
        self.call = FusedCall(layer, steps.norm, steps.activation, 0, None)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Any:
        """Apply the layer and the steps."""
        return self.call.run([input]) if isinstance(self.layer, CSRConvolution) else self.call.run_apart(input, None)


def steps_after(model: nn.Module, layers: Iterable[MaskedLayer]) -> dict[nn.Module, FusedCall]:
    """Return for each masked convolution with such steps the call that runs them, read off the model's code."""
    packed: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        kind = packed_type(layer)
        if kind is not None and issubclass(kind, CSRConvolution) and layer.weight.is_cpu:
            packed[layer] = kind.from_sparse(layer, form="csr")  # a plan looks at types alone, and csr is quickly made
    if not packed:
        return {}
    masked = {convolution: layer for layer, convolution in packed.items()}
    calls = fused_calls(fuse_activations(copy_replacing(model, packed, share_memory=True)))
    return {
        masked[call.layer]: call
        for call in calls
        if call.layer in masked and (call.norm is not None or call.activation != "none")
    }

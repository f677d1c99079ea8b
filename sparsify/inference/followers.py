"""Steps after a convolution, a BatchNorm and an activation, that a packed layer runs in the same call."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from sparsify.conversion.converters.table import packed_type
from sparsify.conversion.module_surgery import copy_replacing
from sparsify.inference.fusion import fuse_activations
from sparsify.kernels import ACTIVATIONS, supports
from sparsify.layers import MaskedLayer
from sparsify.layers.csr_convolution import CSRConvolution
from sparsify.layers.fused_block import FusedCall, fused_calls


class Followed(nn.Module):
    """A layer with the steps after it, in one call of a kernel if the layer is packed and the kernel takes the inputs.

    `FusedCall` has the steps; what a residual adds is left out.
    """

    def __init__(self, layer: nn.Module, steps: FusedCall) -> None:
        """Let the steps follow another layer than their own."""
        super().__init__()
        self.layer, self.norm, self.activation = layer, steps.norm, steps.activation

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer and the steps."""
        y: Tensor
        if isinstance(self.layer, CSRConvolution):
            y = FusedCall(self.layer, self.norm, self.activation, 0, None).run([input])
        else:
            y = self.layer(input)
            y = ACTIVATIONS[self.activation](y if self.norm is None else self.norm(y))
        return y


def steps_after(model: nn.Module, layers: Iterable[MaskedLayer]) -> dict[nn.Module, FusedCall]:
    """Return for each masked convolution with such steps the call that runs them, read off the model's code."""
    panels: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        packed = packed_type(layer)
        if packed is not None and issubclass(packed, CSRConvolution) and _has_kernel(layer):
            panels[layer] = packed.from_sparse(layer, form="panel")
    if not panels:
        return {}
    masked = {panel: layer for layer, panel in panels.items()}
    calls = fused_calls(fuse_activations(copy_replacing(model, panels, share_memory=True)))
    return {
        masked[call.layer]: call
        for call in calls
        if call.layer in masked and (call.norm is not None or call.activation != "none")
    }


def _has_kernel(layer: MaskedLayer) -> bool:
    return layer.weight.is_cpu and supports("panel", layer.weight.device, layer.weight.dtype)

"""DepthwiseConv2d: torch's depthwise convolution, with a kernel of this package for inference on the CPU."""

from __future__ import annotations

from torch import Tensor, nn

from sparsify.kernels import Norm, depthwise
from sparsify.layers.csr_convolution import geometry_of, is_padded_evenly
from sparsify.layers.inference_mode import in_plain_inference
from sparsify.layers.tracing import call_node, tracer_of


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise nn.Conv2d of an exported model: each channel has a dense kernel of its own.

    Parameters and settings are those of nn.Conv2d, and so is the result up to rounding. `export` gives such layers this
    class, `to_dense` gives the old one back. Calls that are differentiated, compiled or traced, of other dtypes than
    float32, bfloat16 and float16, or on other devices than the CPU, are torch's. A BatchNorm and an activation after
    the layer are computed together with it by the module around it, see `layers/fused_block.py`.
    """

    n_dims = 2
    activation = "none"
    #: The operations that are computed together with the layer, in words.
    followed_by = ""

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Return whether the kernel computes a module: a plain depthwise nn.Conv2d, padded evenly with zeros."""
        if type(module) is not nn.Conv2d or "forward" in module.__dict__:
            return False
        return is_padded_evenly(module.__dict__) and 1 < module.groups == module.in_channels == module.out_channels

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (n, channels, height, width), or to one image without n."""
        if type(input) is not Tensor and (tracer := tracer_of(input)) is not None and tracer.root is not self:
            return call_node(self, tracer, input)  # type: ignore[no-any-return]
        y = self.convolve_fused(input, None, None, "none") if in_plain_inference() else None
        return super().forward(input) if y is None else y

    def convolve_fused(
        self,
        input: Tensor,
        norm: Norm | None,
        residual: Tensor | None,
        activation: str,
        *,
        channels_last: bool = False,
    ) -> Tensor | None:
        """Apply the layer, a BatchNorm and an activation in one call, without gradients.

        channels_last: give images that layout, whatever that of the input is. Returns None, for torch to do it, if the
        kernel does not take these tensors; it takes no residual.
        """
        weight, bias = (self._parameters.get(name) for name in ("weight", "bias"))
        if type(input) is not Tensor or residual is not None or weight is None:  # a parametrized weight is no Parameter
            return None
        return depthwise(input, weight, geometry_of(self.__dict__), bias, norm, activation, channels_last=channels_last)

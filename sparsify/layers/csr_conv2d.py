"""CSRConv2d: an exported pointwise convolution. Only the kept weights are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsify.kernels import pointwise
from sparsify.layers.deferred import DeferredOutput
from sparsify.layers.masked import MaskedLayer
from sparsify.layers.packed import PackedLayer
from sparsify.layers.sparse_convolution import SparseConv2d
from sparsify.layers.tracing import call_node, tracer_of


class CSRConv2d(PackedLayer):
    """A 1x1 convolution over a packed weight (out_channels, in_channels); `PackedLayer` describes its buffers.

    Images keep their memory layout, channels first or last. Each read of `weight` unpacks the dense weight.

    >>> layer = CSRConv2d.from_sparse(SparseConv2d(8, 4, 0.75, seed=1))
    >>> layer.n_kept, layer(torch.ones(2, 8, 5, 5)).shape
    (8, torch.Size([2, 4, 5, 5]))
    """

    masked_type: type[MaskedLayer] = SparseConv2d

    @classmethod
    def packs(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether a convolution with these settings is pointwise."""
        shape = settings["kernel_size"], settings["stride"], settings["groups"]
        return shape == ((1, 1), (1, 1), 1) and not any(settings["_reversed_padding_repeated_twice"])

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (n, in_channels, height, width), or to one image without n."""
        bias, activation = self._parameters["bias"], self.activation
        if type(input) is not Tensor and (tracer := tracer_of(input)) is not None:
            if tracer.root is not self:
                return call_node(self, tracer, input)  # type: ignore[no-any-return]
            whole = (input, self.tensors, self.form, self.shape, bias, activation)
            return tracer.create_proxy("call_function", pointwise, whole, {})  # type: ignore[return-value]
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        if self.followed_by != "none" and input.dim() == 4 and self._may_defer(input, 1):
            parts, form, shape = self.tensors, self.form, self.shape
            return DeferredOutput.make(
                lambda activation: pointwise(input, parts, form, shape, bias, activation),
                input,
                (input.shape[0], self.out_features, *input.shape[2:]),
            )
        autocast = self._autocast_dtype(input)
        if autocast is None:
            if self.own_dtype is not None:
                self._check_dtype(input)
            return pointwise(input, self.tensors, self.form, self.shape, bias, activation)
        input = input.to(self.float_dtype)
        return pointwise(input, self.tensors, self.form, self.shape, bias, activation).to(autocast)

    @property
    def in_channels(self) -> int:
        """nn.Conv2d's name for `in_features`."""
        return self.in_features

    @property
    def out_channels(self) -> int:
        """nn.Conv2d's name for `out_features`."""
        return self.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out_channels, in_channels, 1, 1), for code written for nn.Conv2d."""
        return self._unpack()[:, :, None, None]

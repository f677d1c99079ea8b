"""CSRConv2d and CSRConv1d: exported convolutions. Only the kept weights are in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Tracer

from sparsify.kernels import Geometry, Norm, convolution, fused_convolution
from sparsify.layers.masked import MaskedLayer
from sparsify.layers.packed import PackedLayer
from sparsify.layers.sparse_convolution import SparseConv1d, SparseConv2d
from sparsify.layers.tracing import call_node, tracer_of


def is_padded_evenly(settings: Mapping[str, Any]) -> bool:
    """Return whether a convolution with these settings has padding of zeros, as many before each side as behind it."""
    edges = settings["_reversed_padding_repeated_twice"]
    return edges[::2] == edges[1::2] and (settings["padding_mode"] == "zeros" or not any(edges))


def geometry_of(settings: Mapping[str, Any]) -> Geometry:
    """Return settings of torch's, of one or two dimensions, as kernels take them: a signal is an image of one row."""
    padding = settings["_reversed_padding_repeated_twice"][::-2]
    rows = 2 - len(settings["kernel_size"])
    kernel, stride, dilation = ((*(1,) * rows, *settings[name]) for name in ("kernel_size", "stride", "dilation"))
    return Geometry(kernel, stride, (*(0,) * rows, *padding), dilation)


class CSRConvolution(PackedLayer):
    """A convolution over a packed weight (out_channels, in_channels x kernel); `PackedLayer` describes its buffers.

    Images keep their memory layout, channels first or last. A BatchNorm, a sum and an activation after the layer are
    computed together with it by the module around it, see `layers/fused_block.py`. Each read of `weight` unpacks the
    dense weight.
    """

    n_dims: ClassVar[int]

    @cached_property
    def geometry(self) -> Geometry:
        """The settings of the convolution as kernels take them; those of a signal are of an image of one row."""
        return Geometry((1, 1)) if self.dense_settings is None else geometry_of(self.dense_settings)

    @classmethod
    def packs(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether a convolution with these settings has kernels: without groups, padded with zeros evenly."""
        return settings["groups"] == 1 and is_padded_evenly(settings)

    @classmethod
    def worth_measuring(cls, form: str, settings: Mapping[str, Any]) -> bool:
        """Return whether a form has a kernel for these settings, which needs no copies of the inputs."""
        return form == "panel" or geometry_of(settings).is_pointwise

    def _run(self, input: Tensor) -> Tensor:
        """Apply the layer to (n, in_channels, *sizes), or to one image without n."""
        bias, activation = self._parameters["bias"], self.activation
        if type(input) is not Tensor and (tracer := tracer_of(input)) is not None:
            return self._trace(tracer, input, bias)
        if input.dim() == self.n_dims + 1:
            return self._run(input.unsqueeze(0)).squeeze(0)
        autocast = self._autocast_dtype(input)
        if autocast is None:
            if self.own_dtype is not None:
                self._check_dtype(input)
            return self._convolve(input, bias, activation)
        return self._convolve(input.to(self.float_dtype), bias, activation).to(autocast)

    def _convolve(self, input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """Convolve images, or what is an image of one row for the kernels."""
        images = input.unsqueeze(2) if self.n_dims == 1 and input.dim() == 3 else input
        y = convolution(images, self.tensors, self.form, self.shape, self.geometry, bias, activation)
        return y.squeeze(2) if images is not input else y

    def convolve_fused(
        self,
        input: Tensor,
        norm: Norm | None,
        residual: Tensor | None,
        activation: str,
        *,
        channels_last: bool = False,
    ) -> Tensor | None:
        """Apply the layer, a BatchNorm, a sum with the residual and an activation in one call, without gradients.

        channels_last: give images that layout, whatever that of the input is. Returns None if no kernel takes these
        tensors.
        """
        buffers = self._buffers
        if self.form != "panel" or self.own_dtype is not None or self.activation != "none" or type(input) is not Tensor:
            return None
        bias, parts = self._parameters["bias"], (buffers["index"], buffers["values"])
        if self.n_dims == 2:
            settings = (self.shape, self.geometry, bias, norm, residual, activation)
            return fused_convolution(input, parts, *settings, channels_last=channels_last)  # type: ignore[arg-type]
        if input.dim() != 3 or (residual is not None and (type(residual) is not Tensor or residual.dim() != 3)):
            return None
        images, added = input.unsqueeze(2), None if residual is None else residual.unsqueeze(2)
        y = fused_convolution(images, parts, self.shape, self.geometry, bias, norm, added, activation)  # type: ignore[arg-type]
        return None if y is None else y.squeeze(2)

    def _trace(self, tracer: Tracer, input: Tensor, bias: Tensor | None) -> Tensor:
        """Record a call in a graph of torch.fx: of this layer, or of the operator if the layer itself is traced."""
        if tracer.root is not self:
            return call_node(self, tracer, input)  # type: ignore[no-any-return]
        images = input.unsqueeze(2) if self.n_dims == 1 else input
        whole = (images, self.tensors, self.form, self.shape, self.geometry, bias, self.activation)
        y: Tensor = tracer.create_proxy("call_function", convolution, whole, {})  # type: ignore[assignment]
        return y.squeeze(2) if self.n_dims == 1 else y

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The kernel's sizes, as torch's convolutions name them."""
        return self.geometry.kernel[-self.n_dims :]

    @property
    def in_channels(self) -> int:
        """The channels of the input."""
        return self.in_features // math.prod(self.kernel_size)

    @property
    def out_channels(self) -> int:
        """nn.Conv2d's name for `out_features`."""
        return self.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out_channels, in_channels, *kernel_size), for code written for torch's convolutions."""
        return self._unpack().view(self.out_features, self.in_channels, *self.kernel_size)

    def extra_repr(self) -> str:
        """Describe the layer as any packed one, with its kernel and stride."""
        if self.geometry.is_pointwise:
            return super().extra_repr()
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.geometry.stride[-self.n_dims :]}"


class CSRConv2d(CSRConvolution):
    """nn.Conv2d without groups over a packed weight; see `CSRConvolution`.

    >>> layer = CSRConv2d.from_sparse(SparseConv2d(8, 4, 0.75, kernel_size=3, padding=1, seed=1))
    >>> layer.n_kept, layer(torch.ones(2, 8, 5, 5)).shape
    (72, torch.Size([2, 4, 5, 5]))
    """

    n_dims = 2
    masked_type: type[MaskedLayer] = SparseConv2d

    @classmethod
    def packs(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether a convolution with these settings has kernels: without groups, padded with zeros evenly."""
        return super().packs(settings)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (n, in_channels, height, width), or to one image without n."""
        return self._run(input)


class CSRConv1d(CSRConvolution):
    """nn.Conv1d without groups over a packed weight; see `CSRConvolution`."""

    n_dims = 1
    masked_type: type[MaskedLayer] = SparseConv1d

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (n, in_channels, length), or to one signal without n."""
        return self._run(input)

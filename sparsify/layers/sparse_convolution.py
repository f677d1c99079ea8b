"""Convolutions under a mask, plain and transposed, of one to three dimensions, for pruning and training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.layers.torch_layer import TorchLayer
from sparsify.layers.unfolding import spread_out, unfold
from sparsify.masking.methods.registry import Method

#: Values of an unfolded input that are in memory at a time, in calibration.
_PART_VALUES = 2**24

#: The attributes of torch's convolutions beside weight and bias.
_SETTINGS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding"),
    *("groups", "padding_mode", "_reversed_padding_repeated_twice"),
)


class SparseConvolution(TorchLayer):
    """A convolution under a mask; see `MaskedLayer`. Mixed in before torch's class.

    `weight` and `mask` have torch's shape: (out_channels, in_channels / groups, *kernel_size), or (in_channels,
    out_channels / groups, *kernel_size) if transposed. The matrix is (out_channels, in_channels / groups x kernel): one
    row for each output channel, and in a row the kernel of one input channel after that of another. In a transposed
    convolution the kernel is as torch stores it.

    kernel_size: 1 by default.
    sparsity, method, pattern, seed: those of SparseLinear.
    settings: other arguments of torch's class, such as stride and padding.
    """

    setting_names = _SETTINGS
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    padding_mode: str
    in_channels: int
    groups: int
    transposed: bool
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        sparsity: float,
        bias: bool = True,
        *,
        kernel_size: int | tuple[int, ...] = 1,
        method: str | Method = "random",
        pattern: str = "unstructured",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, device=device, dtype=dtype, **settings)
        self._begin(sparsity, method, pattern, seed)

    @classmethod
    def matrix_of(cls, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return the weight of a convolution as (out_channels, in_channels / groups x kernel)."""
        if not settings["transposed"]:
            return weight.reshape(weight.shape[0], math.prod(weight.shape[1:]))
        (n_in, n_out, *kernel), groups = weight.shape, settings["groups"]
        parts = weight.reshape(groups, n_in // groups, n_out, math.prod(kernel)).transpose(1, 2)
        return parts.reshape(groups * n_out, n_in // groups * math.prod(kernel))

    @classmethod
    def weight_of(cls, matrix: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return such a matrix as the weight of a convolution."""
        kernel, groups = settings["kernel_size"], settings["groups"]
        n_out, n_in = matrix.shape[0], matrix.shape[1] // math.prod(kernel)
        if not settings["transposed"]:
            return matrix.reshape(n_out, n_in, *kernel)
        parts = matrix.reshape(groups, n_out // groups, n_in, math.prod(kernel)).transpose(1, 2)
        return parts.reshape(groups * n_in, n_out // groups, *kernel)

    @classmethod
    def default_settings(cls, matrix: Tensor) -> dict[str, Any]:
        """Return the settings of a pointwise convolution without groups."""
        out_channels, in_channels = matrix.shape
        make: Callable[..., nn.Module] = cls.dense_type
        return cls.settings_of(make(in_channels, out_channels, 1, device="meta"))

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape as a matrix, (out_features, in_features)."""
        sizes = self.mask.shape
        if self.transposed:
            return sizes[1] * self.groups, sizes[0] // self.groups * math.prod(sizes[2:])
        return sizes[0], math.prod(sizes[1:])

    def rows(self, input: Tensor) -> Tensor:
        """Return the inputs of each output position: (n, *positions, in_features), or (*positions, in_features).

        With groups: (..., groups, in_features).
        """
        if input.dim() == len(self.kernel_size) + 1:
            return self.rows(input.unsqueeze(0)).squeeze(0)
        return self._as_rows(self._windows(input))

    def row_parts(self, input: Tensor) -> Iterator[Tensor]:
        """Yield the rows of some positions at a time, up to _PART_VALUES values."""
        batched = input if input.dim() == len(self.kernel_size) + 2 else input.unsqueeze(0)
        for image in batched.split(1):
            windows = self._windows(image)
            n_positions = windows.shape[2]
            step = max(_PART_VALUES * n_positions // max(windows.numel(), 1), 1)
            for start in range(0, n_positions, step):
                yield self._as_rows(windows[:, :, start : start + step])

    def _as_rows(self, windows: Tensor) -> Tensor:
        """Return windows (n, channels, *positions, *kernel) as rows; they take new memory unless the kernel is 1."""
        n_dims = len(self.kernel_size)
        rows = windows.movedim(1, n_dims + 1)
        groups = () if self.groups == 1 else (self.groups,)
        return rows.reshape(*rows.shape[: n_dims + 1], *groups, self.shape[1])

    @property
    def input_groups(self) -> int:
        """The groups of the convolution."""
        return self.groups

    @property
    def rows_key(self) -> tuple[Any, ...]:
        """The settings that decide the rows."""
        return type(self), *(str(getattr(self, name)) for name in _SETTINGS if name != "out_channels")

    def input_shape(self, n_rows: int) -> tuple[int, ...]:
        """Return the shape of one input with this many positions or a few more, about square, without padding."""
        n_dims = len(self.kernel_size)
        edge = math.ceil(n_rows ** (1 / n_dims) - 1e-9)
        sizes = zip(self.stride, self.dilation, self.kernel_size, strict=True)
        return 1, self.in_channels, *((edge - 1) * s + d * (k - 1) + 1 for s, d, k in sizes)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (n, in_channels, *sizes), or one input without n."""
        convolve: Callable[..., Tensor] = self._conv_forward  # type: ignore[assignment]
        return convolve(input, self.forward_weight(is_factor=True), self.bias)

    def _windows(self, input: Tensor) -> Tensor:
        """View the inputs of each output position, padded: (n, channels, *positions, *kernel)."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
        return unfold(padded, self.kernel_size, self.stride, self.dilation)


class SparseTransposedConvolution(SparseConvolution):
    """A transposed convolution under a mask; see `SparseConvolution`."""

    padding: tuple[int, ...]
    _convolve: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve (n, in_channels, *sizes), or one input without n; output_size as in torch's class."""
        sizes: Callable[..., list[int]] = self._output_padding  # type: ignore[assignment]
        n_dims = len(self.kernel_size)
        padding = sizes(input, output_size, self.stride, self.padding, self.kernel_size, n_dims, self.dilation)
        settings = self.stride, self.padding, padding, self.groups, self.dilation
        return type(self)._convolve(input, self.forward_weight(is_factor=True), self.bias, *settings)

    def input_shape(self, n_rows: int) -> tuple[int, ...]:
        """Return the shape of one input with this many positions in the first dimension."""
        return 1, self.in_channels, n_rows, *[1] * (len(self.kernel_size) - 1)

    def _windows(self, input: Tensor) -> Tensor:
        """View the inputs of each output position: zeros between inputs stand for the stride."""
        edges: list[int] = []
        sizes = zip(self.kernel_size, self.dilation, self.padding, self.output_padding, strict=True)
        for k, d, p, more in reversed(list(sizes)):
            edges += [d * (k - 1) - p, d * (k - 1) - p + more]
        padded = F.pad(spread_out(input, self.stride), edges)
        n_dims = len(self.kernel_size)
        windows = unfold(padded, self.kernel_size, (1,) * n_dims, self.dilation)
        return windows.flip(tuple(range(windows.dim() - n_dims, windows.dim())))


class SparseConv1d(SparseConvolution, nn.Conv1d):  # type: ignore[misc]
    """nn.Conv1d under a mask; see `SparseConvolution`."""

    dense_type = nn.Conv1d


class SparseConv2d(SparseConvolution, nn.Conv2d):  # type: ignore[misc]
    """nn.Conv2d under a mask; see `SparseConvolution`. isinstance(layer, nn.Conv2d) is true.

    >>> layer = SparseConv2d(8, 4, 0.75, kernel_size=3, padding=1, seed=1)
    >>> layer.sparsity, layer.shape, layer(torch.ones(2, 8, 5, 5)).shape
    (0.75, (4, 72), torch.Size([2, 4, 5, 5]))
    """

    dense_type = nn.Conv2d


class SparseConv3d(SparseConvolution, nn.Conv3d):  # type: ignore[misc]
    """nn.Conv3d under a mask; see `SparseConvolution`."""

    dense_type = nn.Conv3d


class SparseConvTranspose1d(SparseTransposedConvolution, nn.ConvTranspose1d):  # type: ignore[misc]
    """nn.ConvTranspose1d under a mask; see `SparseConvolution`."""

    dense_type, _convolve = nn.ConvTranspose1d, F.conv_transpose1d


class SparseConvTranspose2d(SparseTransposedConvolution, nn.ConvTranspose2d):  # type: ignore[misc]
    """nn.ConvTranspose2d under a mask; see `SparseConvolution`."""

    dense_type, _convolve = nn.ConvTranspose2d, F.conv_transpose2d


class SparseConvTranspose3d(SparseTransposedConvolution, nn.ConvTranspose3d):  # type: ignore[misc]
    """nn.ConvTranspose3d under a mask; see `SparseConvolution`."""

    dense_type, _convolve = nn.ConvTranspose3d, F.conv_transpose3d

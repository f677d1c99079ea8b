"""SparseConv2d: a pointwise convolution under a mask, for pruning and training."""

from __future__ import annotations

from typing import Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.layers.construct import layer_from_parameters
from sparsify.layers.masked import MaskedLayer
from sparsify.masking.methods.registry import Method

_Conv2d = TypeVar("_Conv2d", bound=nn.Conv2d)

#: The attributes of a pointwise nn.Conv2d.
POINTWISE = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "groups": 1}
_REST = {
    **{"dilation": (1, 1), "output_padding": (0, 0), "transposed": False, "padding_mode": "zeros"},
    "_reversed_padding_repeated_twice": [0, 0, 0, 0],
}


class SparseConv2d(MaskedLayer, nn.Conv2d):
    """A 1x1 convolution under a mask, with stride 1, without groups and padding; see `MaskedLayer`.

    `weight` and `mask` are (out_channels, in_channels, 1, 1). isinstance(layer, nn.Conv2d) is true. The arguments after
    the channels are those of SparseLinear.

    >>> layer = SparseConv2d(8, 4, 0.75, seed=1)
    >>> layer.sparsity, layer(torch.ones(2, 8, 5, 5)).shape
    (0.75, torch.Size([2, 4, 5, 5]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        sparsity: float,
        bias: bool = True,
        *,
        method: str | Method = "random",
        pattern: str = "unstructured",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self._keep_all()
        if sparsity != 0 or not self.weight.is_meta:  # without data there is nothing to rank
            self.sparse_update(sparsity, method=method, pattern=pattern, seed=seed)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, mask: Tensor | None = None) -> Self:
        """Make a layer around the same Parameters, under `mask` (out_channels, in_channels), all True by default.

        Raises ValueError, with the reason, unless the convolution is pointwise.
        """
        if odd := odd_setting(conv):
            raise ValueError(f"only pointwise convolutions can be SparseConv2d, this one has {odd}")
        layer = conv2d_from_parameters(cls, conv.weight, conv.bias)
        layer._keep_all()
        if mask is not None:
            layer.set_mask(mask)
        return layer.train(conv.training)

    @classmethod
    def from_matrix(cls, weight: Tensor, mask: Tensor, bias: nn.Parameter | None) -> Self:
        """Make a layer of a weight and a mask, (out_channels, in_channels); the bias is shared."""
        return cls.from_conv2d(conv2d_from_parameters(nn.Conv2d, nn.Parameter(weight[:, :, None, None]), bias), mask)

    def to_conv2d(self) -> nn.Conv2d:
        """Make a plain nn.Conv2d around the same Parameters, with the masked weights set to zero."""
        self.clear_masked(self.weight)
        return conv2d_from_parameters(nn.Conv2d, self.weight, self.bias).train(self.training)

    def matrix(self, tensor: Tensor) -> Tensor:
        """View a tensor of the weight's shape as (out_channels, in_channels)."""
        return tensor[:, :, 0, 0]

    def rows(self, input: Tensor) -> Tensor:
        """View images as (..., in_channels), one row for each position."""
        return input.movedim(-3, -1)

    def input_shape(self, n_rows: int) -> tuple[int, ...]:
        """Return the shape of one image with this many positions."""
        return 1, self.in_channels, n_rows, 1

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (n, in_channels, height, width), or to one image without n."""
        return F.conv2d(input, self.forward_weight(), self.bias)

    def reset_parameters(self) -> None:
        """Initialise weight and bias afresh, as nn.Conv2d does; the mask stays."""
        super().reset_parameters()
        if "mask" in self._buffers:
            self.zero_masked()


def odd_setting(conv: nn.Conv2d) -> str:
    """Return the first setting of a convolution that is not pointwise, with its value; "" without one."""
    for name, wanted in POINTWISE.items():
        value = getattr(conv, name)
        if value != wanted and (name, value) != ("padding", "valid"):  # another word for 0
            return f"{name} {value}"
    return ""


def conv2d_from_parameters(kind: type[_Conv2d], weight: Tensor, bias: Tensor | None) -> _Conv2d:
    """Make a pointwise convolution of the class `kind` around these very Parameters; nothing is allocated or drawn."""
    out_channels, in_channels = weight.shape[:2]
    channels = {"in_channels": in_channels, "out_channels": out_channels}
    return layer_from_parameters(kind, weight, bias, **POINTWISE, **_REST, **channels)

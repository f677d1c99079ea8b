"""MaxPool2d: torch's max pool of images, computed with their channels last in inference on the CPU."""

from __future__ import annotations

from torch import Tensor, channels_last, nn
from torch.nn.modules.utils import _pair

from sparsify.layers.inference_mode import in_plain_inference

#: Below so many channels, or values that are compared, two copies take longer than the pool gains. Two threads of a
#: Xeon 6/167: 3 channels .5 to .9x as fast, 8 of 112 x 112 2.1 to 3.6x; 3 x 3 by 2 over 20 x 20, 32 channels (29,000)
#: .9x, 64 channels 2.1x.
FEWEST_CHANNELS, FEWEST_VALUES = 8, 50_000


class MaxPool2d(nn.MaxPool2d):
    """An nn.MaxPool2d of an exported model, with the settings and the results of torch's.

    torch's pool takes several times as long for images with channels first as for those with channels last, more than
    two copies take. `export` gives such modules this class, `to_dense` gives the old one back. Calls that are
    differentiated, compiled or traced, and those on other devices than the CPU, are torch's.
    """

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Return whether a module is a plain nn.MaxPool2d without indices."""
        return type(module) is nn.MaxPool2d and not module.return_indices and "forward" not in module.__dict__

    def forward(self, input: Tensor) -> Tensor:
        """Pool (n, channels, height, width), or one image without n; the result has the layout of the input."""
        if self._gains(input) and in_plain_inference():
            pooled: Tensor = super().forward(input.contiguous(memory_format=channels_last))
            return pooled.contiguous()
        return super().forward(input)  # type: ignore[no-any-return]

    def _gains(self, x: Tensor) -> bool:
        """Return whether images have channels first, enough of them, and enough values to compare."""
        if type(x) is not Tensor or not x.is_cpu or x.dim() != 4 or x.shape[1] < FEWEST_CHANNELS:
            return False
        (rows, columns), (row_stride, column_stride) = _pair(self.kernel_size), _pair(self.stride)
        n_values = x.numel() * rows * columns // (row_stride * column_stride)
        return n_values >= FEWEST_VALUES and x.is_contiguous()

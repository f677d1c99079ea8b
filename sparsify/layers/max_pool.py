"""MaxPool2d: torch's max pool of images, computed with their channels last in inference on the CPU."""

from __future__ import annotations

from torch import Tensor, channels_last, nn

from sparsify.layers.inference_mode import in_plain_inference

#: Below so many channels torch's pool gains nothing by having them last: it takes a vector of them at a time.
FEWEST_CHANNELS = 16


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
        if _gains(input) and in_plain_inference():
            pooled: Tensor = super().forward(input.contiguous(memory_format=channels_last))
            return pooled.contiguous()
        return super().forward(input)  # type: ignore[no-any-return]


def _gains(x: Tensor) -> bool:
    """Return whether images have channels first, and enough of them."""
    return type(x) is Tensor and x.is_cpu and x.dim() == 4 and x.shape[1] >= FEWEST_CHANNELS and x.is_contiguous()

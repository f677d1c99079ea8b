"""torch's own transformer."""

from __future__ import annotations

import torch
from torch import nn

from zoo_models.model import Model

MODELS = {
    "nn.Transformer": Model(
        small=lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
        inputs=lambda: (torch.randn(2, 6, 32), torch.randn(2, 5, 32)),
        full=lambda: nn.Transformer(batch_first=True),
        full_inputs=lambda: (torch.randn(1, 128, 512), torch.randn(1, 128, 512)),
    )
}

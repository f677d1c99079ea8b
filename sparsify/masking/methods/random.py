"""Random: every weight is as good as another. The baseline of all other methods."""

import torch
from torch import Tensor


def random(weight: Tensor, *, seed: int) -> Tensor:
    """Score each weight by a uniform draw in [0, 1), made on the CPU: one seed gives one mask on every device."""
    draws = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32)
    return draws.to(weight.device)

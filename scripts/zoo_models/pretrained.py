"""Pretrained models, fetched by scripts/assets.py, with outliers and equal values, unlike random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from pretrained import minilm, smollm
from torch import nn

from zoo_models.model import Model

minilm_dense = cache(minilm.load_dense)
smollm_dense = cache(smollm.load_dense)


def _fresh(load: Callable[[], nn.Module]) -> nn.Module:
    """Build the same architecture with random weights."""
    with torch.device("cpu"):
        model = load()
    fresh: nn.Module = type(model)(model.config)
    return fresh


MODELS = {
    "MiniLM-L6": Model(
        small=minilm_dense,
        inputs=lambda: {"input_ids": torch.randint(1000, 30000, (2, 9))},
        full=partial(_fresh, minilm_dense),
        full_inputs=lambda: {"input_ids": torch.randint(1000, 30000, (1, 128))},
        fresh=partial(_fresh, minilm_dense),
    ),
    "SmolLM2-135M": Model(
        small=smollm_dense,
        inputs=lambda: {"input_ids": torch.randint(1000, 30000, (1, 9))},
        full=partial(_fresh, smollm_dense),
        full_inputs=lambda: {"input_ids": torch.randint(1000, 30000, (1, 128))},
        fresh=partial(_fresh, smollm_dense),
        convert={"tied": "skip"},
        quick=False,
    ),
}

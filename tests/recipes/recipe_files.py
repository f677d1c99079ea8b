"""A model for recipes, and recipes written to files."""

from pathlib import Path

import torch
from torch import nn


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 4))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def group(*lines: str) -> str:
    return "groups:\n  - " + "\n    ".join(lines) + "\n"

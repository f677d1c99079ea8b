"""The models to train: an MLP and a Vision Transformer small enough for two cores."""

import torch
from torch import Tensor, nn


def mlp() -> nn.Module:
    """784-512-256-10."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


class ViT(nn.Module):
    """A Vision Transformer of 4 layers over 16 patches of 7x7 pixels (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

    def __init__(self, width: int = 96, n_layers: int = 4, n_heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(49, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, n_heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, n_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images (n, 784); returns (n, 10)."""
        patches = images.reshape(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49)
        hidden: Tensor = self.encoder(self.embed(patches) + self.position)
        logits: Tensor = self.head(hidden.mean(1))
        return logits


MODELS = {"mlp": mlp, "vit": ViT}

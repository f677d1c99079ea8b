"""The models to train: image classifiers and a language model, each small enough for two cores."""

import torch
import torch.nn.functional as F
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


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a 1x1 convolution around them (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.around = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, images: Tensor) -> Tensor:
        """Return images (n, n_out, height / stride, width / stride)."""
        hidden = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(images)))))
        return F.relu(hidden + self.around(images))


def resnet(widths: tuple[int, int, int] = (16, 48, 96)) -> nn.Module:
    """A ResNet of 7 convolutions: maps of 14x14, 7x7 and 4x4 with so many channels."""
    first, second, third = widths
    net = nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()),
        *(Block(first, second, 2), Block(second, third, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, 10)),
    )
    return net.to(memory_format=torch.channels_last)


class LanguageModel(nn.Module):
    """Embedding, one LSTM and a Linear over the vocabulary, with dropout between them."""

    def __init__(self, n_words: int, width: int = 96, hidden: int = 192, dropout: float = 0.4) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_words, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, n_words)
        self.dropout = nn.Dropout(dropout)

    def forward(self, words: Tensor) -> Tensor:
        """Predict the word after each of words (n, length); returns (n x length, n_words)."""
        hidden, _ = self.lstm(self.dropout(self.embed(words)))
        logits: Tensor = self.head(self.dropout(hidden).flatten(0, 1))
        return logits

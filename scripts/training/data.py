"""Fashion-MNIST as two tensors, all in memory, and its order in a training."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from assets import ASSETS, fetch
from torch import Tensor

FOLDER = ASSETS / "fashion-mnist"
MEAN, DEVIATION = 0.2860, 0.3530  # of the training images

Examples = tuple[Tensor, Tensor]


def load(folder: Path = FOLDER) -> tuple[Examples, Examples]:
    """Return (images, labels) for training, 60,000, and for test, 10,000; images are float32 (n, 784), standardised."""
    if folder == FOLDER:
        fetch("fashion-mnist")
    return _read(folder, "train"), _read(folder, "t10k")


def batches(examples: Examples, size: int, seed: int) -> Iterator[Examples]:
    """Go through all examples once, in an order fixed by the seed; the last batch may be smaller."""
    images, labels = examples
    for chosen in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).split(size):
        yield images[chosen], labels[chosen]


def _read(folder: Path, part: str) -> Examples:
    images = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    pixels = torch.from_numpy(images.copy()).reshape(-1, 784).float() / 255
    return (pixels - MEAN) / DEVIATION, torch.from_numpy(labels.copy()).long()

"""A Vision Transformer and a CNN trained on Fashion-MNIST, and their accuracy on its 10,000 test images.

Each is trained once, a few minutes on two cores, and kept in `.assets/fashion-models/`. Calibration takes training
images without their labels.
"""

import functools
from collections.abc import Callable

import torch
from assets import ASSETS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training.data import Examples, batches, load
from training.models import ViT

FOLDER = ASSETS / "fashion-models"
EPOCHS, BATCH = 5, 128


class CNN(nn.Module):
    """Five blocks of a 3x3 convolution, a BatchNorm and a ReLU, and a Linear over the mean of all places."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, stride in sizes
            )
        )
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images (n, 784); returns (n, 10)."""
        logits: Tensor = self.head(self.blocks(images.reshape(-1, 1, 28, 28)).mean((2, 3)))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {"vit": ViT, "cnn": CNN}


@functools.cache
def data() -> tuple[Examples, Examples]:
    """Return (images, labels) for training and for test."""
    return load()


def load_dense(name: str) -> nn.Module:
    """Return the trained model of a name, in eval mode; it is trained if its file is not there."""
    torch.manual_seed(0)
    model = MODELS[name]()
    file = FOLDER / f"{name}.safetensors"
    if not file.exists():
        _train(model)
        FOLDER.mkdir(parents=True, exist_ok=True)
        save_file(dict(model.state_dict()), file)
    model.load_state_dict(load_file(file))
    return model.eval()


def _train(model: nn.Module) -> None:
    """Train by AdamW with a learning rate that falls to 0 on a cosine, in bfloat16 on the way through the model."""
    examples = data()[0]
    n_steps = EPOCHS * -(-len(examples[1]) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for epoch in range(EPOCHS):
        for images, labels in batches(examples, BATCH, seed=epoch):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            loss = nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def calibration(n: int, *, batch_size: int = 128) -> list[dict[str, Tensor]]:
    """Return batches of n training images, evenly spread, without labels."""
    images = data()[0][0]
    chosen = images[torch.arange(n) * len(images) // n]
    return [{"images": batch} for batch in chosen.split(batch_size)]


def accuracy(model: nn.Module) -> float:
    """Return the share of the test images that a model classifies rightly, in percent."""
    images, labels = data()[1]
    with torch.inference_mode():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return 100 * right / len(labels)

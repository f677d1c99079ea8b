"""The tasks: model, data, optimizer, number of epochs and measure of each."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import data, text
from training.models import LanguageModel, ViT, mlp, resnet


@dataclass(frozen=True)
class Task:
    """A model and its training; a cosine takes the learning rate to 0.

    measure: "accuracy", a fraction, or "perplexity"; of the test examples, after the last epoch.
    types: passed to `sparsify.convert`.
    sparsities: of a row without others asked for.
    clip: the largest norm of all gradients, 0 for any.
    """

    title: str
    model: Callable[[], nn.Module]
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 20
    batch: int = 128
    load: Callable[[], tuple[data.Examples, data.Examples]] = data.load
    measure: str = "accuracy"
    types: tuple[type[nn.Module], ...] | None = None
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98)
    clip: float = 0.0


def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    return F.cross_entropy(model(inputs), labels.flatten())


def score(model: nn.Module, test: data.Examples, measure: str) -> float:
    """Return the share of test labels found, or the perplexity of the test text, in float32."""
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for inputs, labels in zip(*(t.split(500) for t in test), strict=True):
            found, wanted = model(inputs), labels.flatten()
            right, losses = found.argmax(1) == wanted, F.cross_entropy(found, wanted, reduction="none")
            total += float((right if measure == "accuracy" else losses).double().sum())
    mean = total / test[1].numel()
    return mean if measure == "accuracy" else float(torch.tensor(mean, dtype=torch.float64).exp())


def _every_second_image() -> tuple[data.Examples, data.Examples]:
    (images, labels), test = data.load()
    return (images[::2], labels[::2]), test


TASKS = {
    "mlp": Task(
        "MLP 784-512-256-10, SGD with momentum",
        mlp,
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
    ),
    "vit": Task(
        "Vision Transformer, 4 layers of width 96, patches of 7x7, AdamW; attention is pruned too",
        ViT,
        torch.optim.AdamW,
        {"lr": 1e-3, "weight_decay": 0.05},
    ),
    "resnet": Task(
        "ResNet of 7 convolutions, 16 to 96 channels, every second image; first and last layer are spared",
        resnet,
        load=_every_second_image,
        optimizer=torch.optim.SGD,
        options={"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
        epochs=5,
        types=(nn.Linear, nn.Conv2d),
        sparsities=(0.9, 0.95),
    ),
    "resnet-wide": Task(
        "The same ResNet with 32 to 128 channels",
        lambda: resnet((32, 64, 128)),
        load=_every_second_image,
        optimizer=torch.optim.SGD,
        options={"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
        epochs=5,
        types=(nn.Linear, nn.Conv2d),
        sparsities=(0.9, 0.95),
    ),
    "lstm": Task(
        "LSTM language model on Brown, 96-192, 2,000 words: LSTM and Linear are pruned, perplexity (lower is better)",
        lambda: LanguageModel(text.N_WORDS),
        torch.optim.AdamW,
        {"lr": 3e-3, "weight_decay": 0.01},
        epochs=4,
        batch=32,
        load=text.load,
        measure="perplexity",
        types=(nn.Linear, nn.LSTM),
        sparsities=(0.8,),
        clip=1.0,
    ),
}
TASKS["lstm-wide"] = replace(
    TASKS["lstm"],
    title="LSTM language model on Brown, 96-384, 2,000 words, dropout 0.4, trained longer",
    model=lambda: LanguageModel(text.N_WORDS, hidden=384, dropout=0.4),
    epochs=16,
)

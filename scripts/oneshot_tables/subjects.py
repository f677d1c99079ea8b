"""The pretrained models to prune: their builders, their calibration data, and measures of quality."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrained import minilm
from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A model and its quality. `batches` takes a number of samples, `n_samples` if not said otherwise."""

    title: str
    calibrated_on: str
    layers: list[str]
    n_samples: int
    load: Callable[[], nn.Module]
    batches: Callable[[int], list[dict[str, Tensor]]]
    #: Takes the dense model, returns a function that tells a pruned one's quality.
    judge: Callable[[nn.Module], Callable[[nn.Module], dict[str, Any]]]
    #: Figure -> its meaning.
    figures: dict[str, str]
    #: Bytes of data in memory during calibration; None: all.
    cache_bytes: int | None = None


def _minilm_judge(dense: nn.Module) -> Callable[[nn.Module], dict[str, Any]]:
    documents, ratings = minilm.lee_documents(), minilm.lee_ratings()
    reference = minilm.embed(documents, dense)

    def judge(model: nn.Module) -> dict[str, Any]:
        found = minilm.embed(documents, model)
        return {
            "cosine": minilm.mean_cosine(found, reference),
            "lee": [minilm.lee_correlation(found, ratings), *minilm.lee_interval(found, ratings)],
        }

    return judge


def _smollm_load() -> nn.Module:
    from pretrained import smollm  # needs gguf; MiniLM does not

    return smollm.load_dense()


def _smollm_batches(n: int) -> list[dict[str, Tensor]]:
    from pretrained import smollm

    return smollm.calibration(n)


def _smollm_judge(dense: nn.Module) -> Callable[[nn.Module], dict[str, Any]]:
    from pretrained import smollm

    return lambda model: {"perplexity": smollm.perplexity(model)}


SUBJECTS = {
    "minilm": Subject(
        "MiniLM-L6: the 36 Linears of the encoder",
        "300 background documents of the Lee collection, of 256 tokens at most, without padding",
        minilm.ENCODER_LAYERS,
        minilm.N_BACKGROUND,
        minilm.load_dense,
        minilm.calibration_batches,
        _minilm_judge,
        {
            "cosine": "Mean cosine of pruned and dense embeddings of the 50 Lee documents, none of them among the 300",
            "lee": "Pearson's r of similarities with human ratings of the 50 documents [95% bootstrap interval]",
        },
    ),
    "smollm2": Subject(
        "SmolLM2-135M: the 210 Linears of the blocks",
        "64 x 384 tokens of the Brown corpus; at most 128 MiB of them stay in memory on their way through the model",
        ["model.layers.*"],
        64,
        _smollm_load,
        _smollm_batches,
        _smollm_judge,
        {"perplexity": "Perplexity on two other files of the Brown corpus (ca01, cg10)"},
        cache_bytes=2**27,
    ),
}

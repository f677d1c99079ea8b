"""The pretrained models to prune: their builders, their calibration data, and measures of quality."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pretrained import minilm
from torch import Tensor, nn
from tradeoff_points.quality import brown_passages

import sparsify


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
    #: Batches to recover on; None: those of the calibration.
    more: Callable[[], list[dict[str, Tensor]]] | None = None
    #: Of a recovery on small batches, hence lower than the default.
    lr: float = 2e-3


def _minilm_judge(dense: nn.Module) -> Callable[[nn.Module], dict[str, Any]]:
    documents, ratings = minilm.lee_documents(), minilm.lee_ratings()
    passages = brown_passages()[0][::4]
    reference, other = minilm.embed(documents, dense), minilm.embed(passages, dense)

    def judge(model: nn.Module) -> dict[str, Any]:
        found, found_other = minilm.embed(documents, model), minilm.embed(passages, model)
        return {
            "cosine": minilm.mean_cosine(found, reference),
            "lee": [minilm.lee_correlation(found, ratings), *minilm.lee_interval(found, ratings)],
            "brown": minilm.mean_cosine(found_other, other),
            "neighbours": _overlap(found_other, other),
        }

    return judge


def _overlap(one: Tensor, other: Tensor, n: int = 10) -> float:
    """Return the mean share of each text's n nearest neighbours that two sets of embeddings agree on."""
    nearest = [(found @ found.T).fill_diagonal_(-2).topk(n).indices.tolist() for found in (one, other)]
    return sum(len({*a} & {*b}) for a, b in zip(*nearest, strict=True)) / (n * len(one))


def _smollm_load() -> nn.Module:
    from pretrained import smollm  # needs gguf; MiniLM does not

    return smollm.load_dense()


def _smollm_batches(n: int) -> list[dict[str, Tensor]]:
    from pretrained import smollm

    return smollm.calibration(n)


def _smollm_more() -> list[dict[str, Tensor]]:
    from pretrained import smollm

    return smollm.tuning()


def _smollm_judge(dense: nn.Module) -> Callable[[nn.Module], dict[str, Any]]:
    from pretrained import smollm

    return lambda model: {
        "perplexity": smollm.perplexity(model),
        "other letters": smollm.perplexity(model, files=smollm.OTHER_FILES),
    }


def _smollm_generated(n: int) -> list[dict[str, Tensor]]:
    return sparsify.generate_data(_smollm_load(), n, 384, batch_size=n, progress=True)


def _fashion_load(name: str) -> nn.Module:
    from pretrained import fashion  # trains the model if it is not there

    return fashion.load_dense(name)


def _fashion_batches(n: int) -> list[dict[str, Tensor]]:
    from pretrained import fashion

    return fashion.calibration(n)


def _fashion_judge(dense: nn.Module) -> Callable[[nn.Module], dict[str, Any]]:
    from pretrained import fashion

    return lambda model: {"accuracy": fashion.accuracy(model)}


_PERPLEXITIES = {
    "perplexity": "Perplexity on two other files of the Brown corpus (ca01, cg10)",
    "other letters": "Perplexity on two more, of other letters (ck05, cr05), which calibration leaves out too",
}
#: Of the two subjects with sentence embeddings.
_EMBEDDINGS = {
    "cosine": "Mean cosine of pruned and dense embeddings of the 50 Lee documents, none of them calibrated on",
    "lee": "Pearson's r of similarities with human ratings of the 50 documents [95% bootstrap interval]",
    "brown": "Mean cosine of 68 passages of 90 words of the Brown corpus, four of each of the 17 files of "
    "`scripts/assets.py`, ca01 to cr05; no text of that corpus is calibrated on",
    "neighbours": "Share of the ten nearest passages of each that the pruned and the dense embeddings agree on",
}

SUBJECTS = {
    "minilm": Subject(
        "MiniLM-L6: the 36 Linears of the encoder",
        "300 background documents of the Lee collection, of 256 tokens at most, without padding",
        minilm.ENCODER_LAYERS,
        minilm.N_BACKGROUND,
        minilm.load_dense,
        minilm.calibration_batches,
        _minilm_judge,
        _EMBEDDINGS,
    ),
    "minilm-mixed": Subject(
        "MiniLM-L6, calibrated on two sources",
        "480 pieces of 128 tokens, without padding: half of the Lee background documents, half of Wikipedia; "
        "recovered on all text of both",
        minilm.ENCODER_LAYERS,
        480,
        minilm.load_dense,
        minilm.mixed_batches,
        _minilm_judge,
        _EMBEDDINGS,
        more=minilm.all_batches,
    ),
    "minilm-prose": Subject(
        "MiniLM-L6, calibrated on three sources",
        "480 pieces of 128 tokens, without padding: a third each of the Lee background documents, of Wikipedia and of "
        "the Brown corpus without the 17 files of the evaluation; recovered on all text of the three",
        minilm.ENCODER_LAYERS,
        480,
        minilm.load_dense,
        partial(minilm.mixed_batches, prose=True),
        _minilm_judge,
        {**_EMBEDDINGS, "brown": _EMBEDDINGS["brown"].replace("that corpus", "these files")},
        more=partial(minilm.all_batches, prose=True),
    ),
    "smollm2": Subject(
        "SmolLM2-135M: the 210 Linears of the blocks",
        "64 x 384 tokens of the Brown corpus; at most 128 MiB of them stay in memory on their way through the model. "
        "Cells without a second perplexity were calibrated on two of its files as well. Recovered on all of the corpus "
        "but the four files of the evaluation",
        ["model.layers.*"],
        64,
        _smollm_load,
        _smollm_batches,
        _smollm_judge,
        _PERPLEXITIES,
        cache_bytes=2**27,
        more=_smollm_more,
        lr=5e-4,
    ),
    "smollm2-generated": Subject(
        "SmolLM2-135M, calibrated on its own text",
        "64 x 384 tokens that the dense model wrote itself (`sparsify.generate_data`)",
        ["model.layers.*"],
        64,
        _smollm_load,
        _smollm_generated,
        _smollm_judge,
        _PERPLEXITIES,
        cache_bytes=2**27,
    ),
    **{
        f"fashion-{name}": Subject(
            f"A small {title} trained on Fashion-MNIST, pruned afterwards",
            "2,048 training images without labels; recovered on all 60,000",
            ["encoder.*"] if name == "vit" else ["blocks.*"],
            2048,
            partial(_fashion_load, name),
            _fashion_batches,
            _fashion_judge,
            {"accuracy": "Accuracy on the 10,000 test images, %"},
            more=partial(_fashion_batches, 60000),
        )
        for name, title in (("vit", "Vision Transformer"), ("cnn", "CNN"))
    },
}

"""The quality of sentence embeddings on two kinds of text, with intervals: news rated by people, and the Brown corpus.

Every text is cut at 128 tokens and padded to 128, so that engines with fixed shapes read the same as all others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pretrained import brown, minilm
from torch import Tensor, nn

N_TOKENS, BATCH = 128, 32
N_WORDS, N_PASSAGES = 90, 16  # of each passage; of each of the 17 files
N_DRAWS = 2000

Embed = Callable[[], Tensor]


def fixed_inputs(batch: int = BATCH) -> dict[str, Tensor]:
    """Make inputs of a fixed shape without padding: random ids, overwritten by `embeddings`."""
    ids = torch.randint(1000, 30000, (batch, N_TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def brown_passages() -> tuple[list[str], NDArray[np.int64]]:
    """Return passages spread evenly over each file of the Brown corpus, and the number of the file of each."""
    passages, of_file = [], []
    for number, name in enumerate(brown.EVALUATION_FILES):
        words = brown.words(name)
        starts = np.linspace(0, len(words) - N_WORDS, N_PASSAGES).astype(int)
        passages += [" ".join(words[start : start + N_WORDS]) for start in starts]
        of_file += [number] * len(starts)
    return passages, np.array(of_file)


def embeddings(texts: list[str], hidden: Callable[[], Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Embed texts by a call that reads `inputs`: the mean over tokens, scaled to length 1; (texts, hidden)."""
    tokenizer = minilm.load_tokenizer(N_TOKENS)
    tokenizer.enable_padding(length=N_TOKENS, pad_id=0, pad_token="[PAD]")
    before = {name: value.clone() for name, value in inputs.items()}
    pooled = []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        encoded = tokenizer.encode_batch([*batch, *texts[: BATCH - len(batch)]])
        inputs["input_ids"].copy_(torch.tensor([x.ids for x in encoded]))
        inputs["attention_mask"].copy_(torch.tensor([x.attention_mask for x in encoded]))
        mask = inputs["attention_mask"][:, :, None]
        mean = (hidden() * mask).sum(1) / mask.sum(1)
        pooled.append(mean[: len(batch)].clone())
    for name, value in before.items():
        inputs[name].copy_(value)
    return nn.functional.normalize(torch.cat(pooled), dim=1)


@dataclass(frozen=True)
class Judge:
    """Dense embeddings of both kinds of text, and what they are judged by."""

    news: list[str]
    ratings: NDArray[np.float64]
    passages: list[str]
    of_file: NDArray[np.int64]
    dense_news: Tensor
    dense_passages: Tensor

    @classmethod
    def of(cls, hidden: Callable[[], Tensor], inputs: dict[str, Tensor]) -> "Judge":
        """Embed the texts by the dense model."""
        news, (passages, of_file) = minilm.lee_documents(), brown_passages()
        dense = [embeddings(texts, hidden, inputs) for texts in (news, passages)]
        return cls(news, minilm.lee_ratings(), passages, of_file, *dense)

    def quality(self, hidden: Callable[[], Tensor], inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Return the figures of a candidate, those of tasks as [value, low, high].

        lee: Pearson's r of similarities with human ratings. brown: share of passages with their nearest other passage
        in the same file. lee_change and brown_change: the same less the dense model's, on the same draws of texts.
        lee_cosine and brown_cosine: mean cosine to the dense embeddings.
        """
        news, passages = (embeddings(texts, hidden, inputs) for texts in (self.news, self.passages))
        return {
            "lee": _interval(self._lee(news), len(self.news)),
            "lee_change": _interval(_difference(self._lee(news), self._lee(self.dense_news)), len(self.news)),
            "lee_cosine": round(minilm.mean_cosine(news, self.dense_news), 5),
            "brown": _interval(self._brown(passages), len(self.passages)),
            "brown_change": _interval(
                _difference(self._brown(passages), self._brown(self.dense_passages)), len(self.passages)
            ),
            "brown_cosine": round(minilm.mean_cosine(passages, self.dense_passages), 5),
        }

    def _lee(self, found: Tensor) -> Callable[[NDArray[np.int64]], float]:
        """Return the correlation over pairs of drawn documents; a pair of a document with itself is left out."""
        cosines = (found.double() @ found.double().T).numpy()
        rated = np.triu(self.ratings, k=1) + np.triu(self.ratings, k=1).T
        rows, columns = np.triu_indices(len(cosines), k=1)

        def correlation(drawn: NDArray[np.int64]) -> float:
            left, right = drawn[rows], drawn[columns]
            left, right = left[left != right], right[left != right]
            return float(np.corrcoef(cosines[left, right], rated[left, right])[0, 1])

        return correlation

    def _brown(self, found: Tensor) -> Callable[[NDArray[np.int64]], float]:
        cosines = (found.double() @ found.double().T).fill_diagonal_(-1)
        same = (self.of_file[cosines.argmax(1).numpy()] == self.of_file).astype(float)
        return lambda drawn: float(same[drawn].mean())


def _difference(
    one: Callable[[NDArray[np.int64]], float], other: Callable[[NDArray[np.int64]], float]
) -> Callable[[NDArray[np.int64]], float]:
    return lambda drawn: one(drawn) - other(drawn)


def _interval(figure: Callable[[NDArray[np.int64]], float], n: int) -> list[float]:
    """Return a figure over all n texts, and its 95% bootstrap interval over draws of texts (the same in each call)."""
    generator = np.random.default_rng(0)
    draws = [figure(generator.integers(n, size=n)) for _ in range(N_DRAWS)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return [round(float(value), 4) for value in (figure(np.arange(n)), low, high)]

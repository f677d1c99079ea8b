"""Models of torch alone: its transformer, a tagger and a recommender."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo_models.model import Model


class Tagger(nn.Module):
    """A tag for each word, by two bidirectional LSTMs (Huang et al. 2015, arXiv:1508.01991)."""

    def __init__(self, n_words: int = 20_000, width: int = 200, hidden: int = 256, n_tags: int = 45) -> None:
        super().__init__()
        self.words = nn.Embedding(n_words, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, n_tags)

    def forward(self, words: Tensor) -> Tensor:
        """Return the logits of the tags, (n, length, n_tags), of words (n, length)."""
        logits: Tensor = self.head(self.lstm(self.words(words))[0])
        return logits


class Recommender(nn.Module):
    """A click probability from numbers and categories, by products of their vectors (DLRM, arXiv:1906.00091)."""

    def __init__(self, n_rows: int = 100_000, n_tables: int = 8, width: int = 64, hidden: int = 512) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(n_rows, width, mode="sum") for _ in range(n_tables))
        self.bottom = nn.Sequential(nn.Linear(13, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU())
        n_products = (n_tables + 1) * n_tables // 2
        self.top = nn.Sequential(nn.Linear(width + n_products, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Return the logits (n, 1) for numbers (n, 13) and categories (n, n_tables, bag)."""
        dense: Tensor = self.bottom(numbers)
        vectors = torch.stack([dense, *(table(categories[:, i]) for i, table in enumerate(self.tables))], 1)
        rows, columns = torch.triu_indices(vectors.shape[1], vectors.shape[1], 1, device="cpu").tolist()
        products = (vectors @ vectors.mT)[:, rows, columns]
        logits: Tensor = self.top(torch.cat([dense, products], 1))
        return logits


MODELS = {
    "nn.Transformer": Model(
        small=lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
        inputs=lambda: (torch.randn(2, 6, 32), torch.randn(2, 5, 32)),
        full=lambda: nn.Transformer(batch_first=True),
        full_inputs=lambda: (torch.randn(1, 128, 512), torch.randn(1, 128, 512)),
    ),
    "LSTM tagger": Model(
        small=lambda: Tagger(50, 16, 12, 5),
        inputs=lambda: (torch.randint(50, (2, 6)),),
        full=Tagger,
        full_inputs=lambda: (torch.randint(50, (1, 128)),),
        convert={"types": [nn.Linear, nn.LSTM, nn.Embedding]},
    ),
    "recommender": Model(
        small=lambda: Recommender(50, 3, 8, 16),
        inputs=lambda: (torch.randn(2, 13), torch.randint(50, (2, 3, 4))),
        full=Recommender,
        full_inputs=lambda: (torch.randn(1, 13), torch.randint(50, (1, 8, 4))),
        convert={"types": [nn.Linear, nn.EmbeddingBag]},
    ),
}

"""Texts that a language model writes: of the wanted size, from a seed, with and without a key-value cache."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify


class Writer(nn.Module):
    """Logits of the next token from the one before, and a cache that counts the tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)
        self.n_read = 0

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        self.n_read += input_ids.shape[1]
        return SimpleNamespace(logits=self.table(input_ids), past_key_values=(past_key_values or 0) + 1)


class Plain(Writer):
    """The same without a cache."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.table(input_ids)


def made(kind: type[Writer] = Writer, **options: Any) -> tuple[Writer, Tensor]:
    torch.manual_seed(0)
    model = kind().train()
    batches = sparsify.generate_data(model, 5, 6, **{"batch_size": 2, **options})
    assert [batch["input_ids"].shape for batch in batches] == [(2, 6), (2, 6), (1, 6)]
    return model, torch.cat([batch["input_ids"] for batch in batches])


def test_the_same_from_a_seed_and_without_a_cache() -> None:
    model, ids = made()
    assert model.training
    assert model.n_read == 2 + 3 * 5  # each token but the last is read once
    assert torch.equal(ids, made(Plain)[1])
    assert not torch.equal(ids, made(seed=1)[1])


def test_a_low_temperature_takes_the_likeliest() -> None:
    model, ids = made(temperature=1e-4)
    assert torch.equal(model.table.weight.argmax(1)[ids[:, :-1]], ids[:, 1:])


def test_it_calibrates() -> None:
    model, _ = made(Plain)
    model = sparsify.convert(nn.Sequential(model.table, nn.Linear(11, 11)))
    sparsify.prune(model, 0.5, method="sparsegpt", data=[made(Plain)[1]])
    assert model[1].mask.float().mean() == pytest.approx(0.5, abs=0.01)


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model does not run on input_ids alone"):
        sparsify.generate_data(nn.Linear(4, 4), 1, 2)

    class Encoder(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids.float()

    with pytest.raises(ValueError, match=r"logits \(batch, tokens, vocabulary\), and its output .* is no tensor"):
        sparsify.generate_data(Encoder(), 1, 2)
    with pytest.raises(ValueError, match=r"must be positive and finite, got 0, 2, 32 and 1\.0"):
        sparsify.generate_data(Encoder(), 0, 2)

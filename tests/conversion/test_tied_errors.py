"""Tied weights are an error of convert: both names and the way out, and nothing changed."""

import pytest
import torch
from converted_models import assert_unchanged, snapshot
from torch import nn

from sparsify import SparseLinear, convert


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_weight_is_an_error_that_names_both_and_the_way_out() -> None:
    model = Tied()
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"head: its weight is tied: embedding\.weight and head\.weight .*"
        r"exclude=\['head'\] or tied='skip', .* tied='share', or untie",
    ):
        convert(model)
    assert_unchanged(model, before)
    convert(model, exclude=["head"])  # the way out
    assert isinstance(model.fc, SparseLinear)
    assert model.head.weight is model.embedding.weight


def test_two_tied_linears_and_tied_memory_are_errors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0: its weight is tied: 0\.weight and 1\.weight are one Parameter"):
        convert(model)
    model[1].weight = nn.Parameter(model[0].weight.detach())  # another object over the same memory
    with pytest.raises(ValueError, match="its weight is tied"):
        convert(model)
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    convert(model)


def test_weights_that_overlap_in_memory_are_tied_too() -> None:
    whole = torch.randn(8, 4)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[0].weight = nn.Parameter(whole)
    net[1].weight = nn.Parameter(whole[4:])
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one Parameter"):
        convert(net)
    net[0] = nn.Linear(4, 4, bias=False)
    net[0].weight = nn.Parameter(whole[:4])  # beside each other in one memory: not tied
    assert type(convert(net)[1]) is SparseLinear

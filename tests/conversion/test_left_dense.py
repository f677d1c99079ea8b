"""Weights of no kind are named by convert if they are most of the model and no option has chosen layers."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from sparsify import LeftDenseWarning, convert


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.out = nn.Embedding(9, 4), nn.LSTM(4, 16), nn.Linear(16, 2)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.lstm, self.out = nn.Conv2d(3, 8, 3), nn.LSTM(4, 16), nn.Linear(16, 20)


class Experts(nn.Module):
    """Weights of several experts in one Parameter, as transformers holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Parameter(torch.randn(4, 8, 8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.einsum("bi,eoi->bo", x, self.up))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x @ self.up)


def normed() -> nn.Sequential:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (
            Recurrent,
            {},
            r"^most weights stay dense, 86\.6% .*: lstm \(LSTM\); types=\[.*LSTM\] takes.*; with types=",
        ),
        (
            Convolutions,
            {},
            r"lstm \(LSTM\); features \(Conv2d\); types=\[torch.nn.Linear, .*Conv2d, torch.nn.LSTM\] takes.*; with",
        ),
        (Experts, {}, r"93\.4% .*: \(root\) \(Experts\); functional=True takes Parameters that"),
        (Experts, {"functional": True}, r"93\.4% .*: \(root\) \(Experts\); with"),
        (Product, {}, r"79\.0% .*: \(root\) \(Product\); functional=True takes Parameters that"),
        (normed, {}, r"0 \(Conv1d\); with"),
        (lambda: nn.DataParallel(Recurrent()), {"include": "*"}, r"module\.lstm \(LSTM\)"),
    ],
)
def test_a_majority_that_no_kind_covers_is_named_with_its_share(build, options: dict, said: str) -> None:  # type: ignore[no-untyped-def, type-arg]
    with pytest.warns(LeftDenseWarning, match=said) as caught:
        convert(build(), **options)
    assert len(caught) == 1


def test_one_notice_says_both_what_cannot_and_what_no_kind_covers() -> None:
    model = Recurrent()
    model.odd = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.warns(
        LeftDenseWarning, match=r"^1 layer stays dense, .*: odd \(it is p.*\. most weights .*lstm"
    ) as caught:
        convert(model)
    assert len(caught) == 1


class Mostly(nn.Module):
    """A model of Linears with a large vocabulary, positions, a small convolution and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(500, 8), nn.Parameter(torch.zeros(1, 5, 8))
        self.stem, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 500, bias=False)
        self.head.weight = self.embedding.weight
        self.fc = nn.Linear(8, 16)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (Mostly, {"tied": "share"}),
        (Mostly, {"exclude": "head"}),
        (Recurrent, {"types": nn.Linear}),
        (Recurrent, {"include": "out"}),
        (Recurrent, {"include": nn.Linear}),
        (Product, {"functional": True}),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(8, 2), nn.Conv1d(3, 3, 3)), {}),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 2, 3), nn.LazyConv2d(4, 3)), {}),
    ],
)
def test_it_is_silent_where_linears_are_most_or_the_user_says_what_to_take(build, options: dict) -> None:  # type: ignore[no-untyped-def, type-arg]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = convert(build(), **options)
        convert(model, **options)

"""Inputs have one fingerprint exactly if a run would see the same in them."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsify.offload.fingerprints import data_fingerprint, structure_fingerprint, tensors_fingerprint


@dataclass
class Pair:
    """A batch of a kind of its own."""

    x: torch.Tensor
    y: torch.Tensor


class Scaled(nn.Module):
    """A module whose printed form does not show what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


A, B = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
DIFFERENT: list[list[Any]] = [
    [],
    [A],
    [B],
    [A, A],
    [(A, A)],
    [[A], A],
    [A.T.contiguous()],
    [A.reshape(3, 2)],
    [A.double()],
    [A.to(torch.bfloat16)],
    [A.int()],
    [A.bool()],
    [A.to_sparse()],
    [torch.nested.nested_tensor([A, B], layout=torch.jagged)],
    [torch.complex(A, A)],
    [torch.complex(A, -A)],
    [torch.complex(A, A), 1],
    [{"ids": A, "mask": B}],
    [{"ids": B, "mask": A}],
    [{"ids": A, "other": B}],
    [(A, 1)],
    [(A, 1.0)],
    [(A, True)],
    [(A, "1")],
    [(A, None)],
    [Pair(A, B)],
    [Pair(B, A)],
    [A.numpy()],
    [B.numpy()],
    [np.arange(6)],
    [torch.empty(0)],
    [torch.empty(0, 1)],
    [torch.tensor(0.0)],
    [torch.tensor(-0.0)],
    [torch.tensor(torch.nan)],
]


def test_different_data_differ() -> None:
    assert len({data_fingerprint(data) for data in DIFFERENT}) == len(DIFFERENT)


SAME: list[tuple[Any, Any]] = [
    (A.T, A.T.contiguous()),
    (A[:1].expand(4, 3), A[:1].repeat(4, 1)),
    (torch.complex(A, A).conj(), torch.complex(A, -A)),
    ({"a": A, "b": B}, {"b": B, "a": A}),
    ({"a": A}, OrderedDict(a=A)),
    ([A, B], (A, B)),
    (object(), object()),
    (nn.Parameter(A), A),
]


@pytest.mark.parametrize("number", range(len(SAME)))
def test_the_same_data_in_another_dress_do_not(number: int) -> None:
    one, other = SAME[number]
    assert data_fingerprint([one]) == data_fingerprint([other]) == data_fingerprint(iter([one]))


def test_data_on_meta_are_no_data() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) is on the meta device and has no data"):
        data_fingerprint([A.to("meta")])


def test_tensors_count_with_their_names() -> None:
    state = {"a": A, "b": B}
    prints = [list(state.items()), [("a", B), ("b", A)], [("b", B), ("a", A)], [("a", A)], [("a", A), ("b", -B)]]
    assert len({tensors_fingerprint(tensors) for tensors in prints}) == len(prints)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    "another activation": lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()),
    "another option": lambda: nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.3)),
    "a module of one's own": lambda: nn.Sequential(nn.Linear(4, 4), Scaled()),
}


def test_structure_is_more_than_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {name: structure_fingerprint(build()) for name, build in MODELS.items()}
    assert len(set(first.values())) == len(MODELS)
    assert first == {name: structure_fingerprint(build()) for name, build in MODELS.items()}
    monkeypatch.setattr("inspect.getsource", lambda kind: "def forward(self, x): return 3 * x")
    edited = {name: structure_fingerprint(build()) for name, build in MODELS.items()}
    assert [name for name in MODELS if edited[name] != first[name]] == ["a module of one's own"]

    def nowhere(kind: type) -> str:
        raise OSError

    monkeypatch.setattr("inspect.getsource", nowhere)
    assert structure_fingerprint(MODELS["a module of one's own"]()) != first["plain"]

"""Attention between finished layers is computed once in a pass, and changes nothing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sparsify

DATA = [weight((2, 5, 8), seed=i) for i in range(3)]
N_BLOCKS = 2


class Block(nn.Module):
    """Attention, a write into its output, and two layers behind it."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(2, 5, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed * 2 if torch.is_grad_enabled() else mixed.mul_(2)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        y = self.up(x)
        if self.twice:
            y = y + self.up(F.scaled_dot_product_attention(x, self.down(y), x))
        return x + self.down(torch.tanh(y))


class Count(TorchFunctionMode):
    """The number of calls of attention."""

    n = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def pruned(twice: bool, **options: Any) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    model = sparsify.convert(nn.Sequential(*(Block(twice=twice) for _ in range(N_BLOCKS))))
    with Count() as count:
        sparsify.prune(model, 0.5, method="sparsegpt", data=DATA, **options)
    return model, count.n


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("options", [{}, {"correct": True}, {"reconstruct": 1}])
def test_the_result_is_that_of_runs_without_a_cache(one_thread: None, twice: bool, options: dict[str, Any]) -> None:
    (one, n_one), (other, n_other) = (pruned(twice, cache_bytes=n, **options) for n in (None, 0))
    assert n_one < n_other
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_once_in_each_pass() -> None:
    in_traces = 3 * N_BLOCKS - N_BLOCKS  # the trace of the model, and its check, bypassed and not
    assert pruned(False)[1] == in_traces + N_BLOCKS * len(DATA)

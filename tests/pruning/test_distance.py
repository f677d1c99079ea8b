"""The loss of a tuning: relative to the variance, and not decided by a few massive rows."""

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.pruning.distance import relative_distance
from sparsify.pruning.recover import recover


def plain(found: Tensor, wanted: Tensor) -> Tensor:
    """The squared distance relative to the variance, every row counted as it is."""
    return (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()


@pytest.mark.parametrize("shape", [(7, 5), (64, 3), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_usual_sizes_count_as_they_are(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, found = (1 + torch.rand(shape, generator=generator, dtype=dtype) for _ in range(2))
    wanted[: shape[0] // 2] *= -1  # all rows deviate about as much from a mean near zero
    torch.testing.assert_close(relative_distance(found, wanted), plain(found, wanted))


def test_a_massive_row_counts_as_ten_typical_ones() -> None:
    wanted = torch.randn(101, 16, generator=torch.Generator().manual_seed(0))
    wanted[0] = 1000.0
    off = wanted.clone()
    off[0] *= 1.1
    others = wanted.clone()
    others[1:] *= 1.1
    assert float(plain(off, wanted)) > 1000 * float(plain(others, wanted))
    assert float(relative_distance(off, wanted)) < 0.2 * float(relative_distance(others, wanted))


def test_constant_rows_have_no_say_in_what_is_typical() -> None:
    """More than half of the rows are the mean row: the median of all would be zero."""
    wanted = torch.zeros(9, 4)
    wanted[0], wanted[1] = torch.tensor([1.0, 2, 3, 4]), torch.tensor([-1.0, -2, -3, -4])
    assert float(relative_distance(1.1 * wanted, wanted)) == pytest.approx(0.01)
    assert float(relative_distance(torch.zeros(9, 4), torch.zeros(9, 4))) == 0


class Block(nn.Module):
    """Adds to a residual stream, and norms it before, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_recovery_reaches_the_tokens_beside_a_massive_one() -> None:
    """The first block makes the first token massive: pruned, it errs by more there than on all the others together."""
    torch.manual_seed(0)
    dense = nn.Sequential(*(Block() for _ in range(3)))
    with torch.no_grad():
        dense[0].down.weight[3, :8] += 100.0
        dense[0].up.bias[:8] -= 2.0
        dense[0].up.weight[:8, 5] += 1.0
    model = sparsify.convert(dense)
    teacher = copy.deepcopy(model)
    data = [torch.randn(4, 12, 16) for _ in range(4)]
    for x in data:
        x[:, :, 5] = -1.0
        x[:, 0, 5] = 20.0
    sparsify.prune(model, 0.6, method="random", seed=0)

    def error() -> float:
        with torch.no_grad():
            pairs = [(model(x)[:, 1:].flatten(0, 1), teacher(x)[:, 1:].flatten(0, 1)) for x in data]
        return sum(float(plain(*pair)) for pair in pairs) / len(data)

    before = error()
    recover(model, teacher, data, steps=100, lr=3e-3)
    assert error() < 0.5 * before

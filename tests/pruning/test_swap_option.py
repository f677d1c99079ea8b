"""With swap=True a layer has as many weights, and a smaller error."""

from typing import Any

import pytest
from cases import weight
from torch import nn

import sparsify
from sparsify.masking.methods.registry import CALIBRATED, SOLVERS

X = weight((64, 24), seed=5) @ weight((24, 24), seed=6)


@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"sparsity": 0.6, "refit": True}, {"pattern": "2:4"}])
@pytest.mark.parametrize("method", [*CALIBRATED, *SOLVERS])
def test_the_error_falls_and_the_count_stays(method: str, options: dict[str, Any]) -> None:
    found = {}
    for swaps in (False, True):
        model = sparsify.convert(nn.Sequential(nn.Linear(24, 12)))
        with_weight = weight((12, 24), seed=4)
        model[0].weight.data.copy_(with_weight)
        found[swaps] = sparsify.prune(model, method=method, data=[X], swap=swaps, **options)[0]
    before, after = found[False], found[True]
    assert int(after.mask.sum()) == int(before.mask.sum())
    assert bool(((after.weight != 0) <= after.mask).all())
    assert after.pruning_result.error <= before.pruning_result.error * (1 + 1e-6)
    if method == "wanda":
        assert after.pruning_result.error < 0.95 * before.pruning_result.error


def test_without_data_it_is_refused() -> None:
    model = sparsify.convert(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="swap=True has no effect without data"):
        sparsify.prune(model, 0.5, swap=True)
    with pytest.raises(ValueError, match="'swap' needs calibration data, which is looked at once"):
        sparsify.Recipe(groups=[{"sparsity": 0.5, "swap": True, "schedule": {"kind": "linear", "end": 4, "every": 1}}])

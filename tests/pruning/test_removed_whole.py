"""A layer that loses all its weights is named in a warning, unless that was asked for."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify import Recipe, RemovedLayerWarning, apply, convert, prune
from sparsify.recipes.apply import recipe_layer_specs

X = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
SMALL = r"^2: all weights are removed, .*{} below 1, or leave such layers dense with exclude=\['2'\]$"


def model() -> nn.Sequential:
    """A layer, and a head so small that 99% of it is all of it."""
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)))
    with torch.no_grad():
        net[2].weight.mul_(1e-3)  # the first to go where layers are ranked together
    return net


def recipe(**group: object) -> Recipe:
    return Recipe(groups=[{"layers": ["0"], "sparsity": 0.5}, {"layers": ["2"], **group}])


@pytest.mark.parametrize(
    ("run", "cap"),
    [
        (lambda: prune(model(), 0.99), "max_sparsity"),
        (lambda: prune(model(), 0.9, allocation="global"), "max_sparsity"),
        (lambda: prune(model(), 0.9, method="wanda", allocation="global", data=[X]), "max_sparsity"),
        (lambda: prune(model(), 0.99, method="sparsegpt", data=[X]), "allocation='erk' or 'global' and max_sparsity"),
        (lambda: prune(model(), 0.75, pattern="rows", include="2"), "max_sparsity"),
        (lambda: prune(model(), allocation={"0": 0.5, "2": 0.999}), "max_sparsity"),
        (lambda: apply(model(), recipe(sparsity=0.99)), "max_sparsity"),
        (lambda: apply(model(), recipe(sparsity=0.99), data=[X]), "max_sparsity"),
        (lambda: recipe_layer_specs(recipe(sparsity=0.99), model()), "max_sparsity"),
    ],
)
def test_it_is_said(run: Callable[[], object], cap: str) -> None:
    with pytest.warns(RemovedLayerWarning, match=SMALL.format(cap)) as caught:
        run()
    assert len(caught) == 1


@pytest.mark.parametrize("data", [None, [X]])
def test_it_is_not_said_where_it_was_asked_for(data: list[Tensor] | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net in (
            prune(model(), 1.0, data=data),
            prune(model(), 1.0, allocation="erk", data=data),
            prune(model(), allocation={"0": 0.5, "2": 1.0}, data=data),
            apply(model(), recipe(sparsity=1.0), data=data),
        ):
            assert net[2].sparsity == 1.0
        assert prune(model(), 0.9, allocation="global", max_sparsity=0.95, data=data)[2].sparsity < 1


def test_all_such_layers_are_in_one_warning() -> None:
    net = convert(nn.Sequential(*(nn.Linear(2, 2) for _ in range(30))))
    with pytest.warns(RemovedLayerWarning, match=r"^0, 1, 2, .*, 19, \.\.\. \(10 more\): all weights") as caught:
        prune(net, 0.9)
    assert len(caught) == 1

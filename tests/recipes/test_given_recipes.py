"""The files in recipes/ do what they say."""

import operator
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recipe_files import net
from torch import nn

import sparsify
from sparsify import Pruner, Recipe, SparseLinear
from sparsify.recipes.dry_run import plan

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    wanted = {"magnitude-50", "random-50", "global-magnitude-80", "nm-2-4", "gradual-magnitude-90"}
    assert wanted <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_ours_works_and_does_what_it_says(path: Path) -> None:
    recipe = sparsify.load_recipe(path)
    assert recipe.description
    assert path.read_text().startswith("#")
    model = sparsify.convert(net())
    group = recipe.groups[0]
    wanted = 0.0 if group.method == "hold" else group.sparsity or 0.5
    if (given := re.search(r"-(\d\d)$", path.stem)) is not None:
        assert wanted == int(given[1]) / 100
    layers = [model.get_submodule(x.name) for x in plan(recipe, net())]
    assert all(isinstance(layer, SparseLinear) for layer in layers)
    if group.trains:
        with pytest.raises(ValueError, match="Pruner"):
            sparsify.apply(model, recipe)
        _train(model, recipe, n_epochs=10)
    elif any(group.needs_data for group in recipe.groups):
        sparsify.apply(model, recipe, data=[torch.randn(32, model[0].in_features)])
    else:
        sparsify.apply(model, recipe)
    n_zeros = [int((~layer.mask).sum()) for layer in layers]
    sizes = [layer.mask.numel() for layer in layers]
    if group.allocation == "uniform":
        assert n_zeros == [round(wanted * size) for size in sizes]
    else:
        assert sum(n_zeros) == round(wanted * sum(sizes))
        assert len({layer.sparsity for layer in layers}) > 1 or len(layers) == 1
    assert all(torch.count_nonzero(layer.weight[~layer.mask]) == 0 for layer in layers)
    planned = [x.targets[-1][1] for x in plan(recipe, net())]
    if group.allocation == "global" and (group.trains or group.method != "magnitude"):
        # The layers' parts follow from scores at the time of the update; their sum does not.
        assert sum(map(operator.mul, planned, sizes)) == pytest.approx(sum(n_zeros))
    else:
        assert planned == pytest.approx([layer.sparsity for layer in layers])


def _train(model: nn.Module, recipe: Recipe, n_epochs: int) -> None:
    """Follow a recipe in a training of ten steps an epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loss() -> torch.Tensor:
        return model(torch.randn(8, 16)).square().mean()

    pruner = Pruner(
        model, recipe, optimizer=optimizer, steps_per_epoch=10, total_steps=10 * n_epochs, loss=_loss_for(recipe, loss)
    )
    for _ in range(n_epochs):
        for _ in range(10):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            pruner.step()
        pruner.end_epoch()
    pruner.finish()


def _loss_for(recipe: Recipe, loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor] | None:
    return loss if recipe.groups[0].method in ("snip", "grasp") else None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_variables_of_our_recipes_can_be_set(path: Path) -> None:
    recipe = sparsify.load_recipe(path, layers=["0", "2"], exclude=["2"])
    assert [x.name for x in plan(recipe, net())] == ["0"]

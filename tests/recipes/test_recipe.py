"""Recipes as read: variables, numbers, groups, allocations; a recipe without a match in the model changes nothing."""

import math
from pathlib import Path

import pytest
import torch
from recipe_files import group, net, written

import sparsify
from sparsify import Recipe, RecipeError, SparseLinear


def test_numbers_and_patterns_mean_what_they_look_like(tmp_path: Path) -> None:
    """YAML 1.1 would read 2:4 in base 60, as 124, and 9e-1 as text."""
    path = written(tmp_path, group("pattern: 2:4") + "  - sparsity: 9e-1\n")
    recipe = sparsify.load_recipe(path)
    assert recipe.groups[0].pattern == "2:4"
    assert recipe.groups[1].sparsity == 0.9
    path = written(tmp_path, 'description: "9e-1"\n' + group("sparsity: 0.5"))
    assert sparsify.load_recipe(path).description == "9e-1"


def test_a_variable_is_put_in_with_its_type_and_can_be_overridden(tmp_path: Path) -> None:
    text = 'vars: {s: 0.5, names: ["0"]}\ngroups:\n  - sparsity: ${s}\n    layers: ${names}\n'
    path = written(tmp_path, text)
    assert sparsify.load_recipe(path).groups[0].layers == ["0"]
    recipe = sparsify.load_recipe(path, s=0.75, names=["2", "3"])
    assert recipe.groups[0].sparsity == 0.75
    assert recipe.groups[0].layers == ["2", "3"]
    assert recipe.vars == {"s": 0.75, "names": ["2", "3"]}
    with pytest.raises(RecipeError, match="no variable 'nmes' to set; did you mean 'names'"):
        sparsify.load_recipe(path, nmes=[])
    with pytest.raises(RecipeError, match=r"groups\.0\.sparsity: .*got 7"):
        sparsify.load_recipe(path, s=7)


def test_a_recipe_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Recipe(groups=[{"sparsity": 2}])
    with pytest.raises(ValueError, match="methd"):
        Recipe(groups=[{"sparsity": 0.5, "methd": "random"}])


def test_several_groups_with_their_own_targets(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        'groups:\n  - layers: ["0"]\n    sparsity: 0.5\n  - layers: ["2", "3"]\n    exclude: ["3"]\n    sparsity: .8\n',
    )
    model = sparsify.apply(sparsify.convert(net()), sparsify.load_recipe(path))
    assert [model[i].sparsity for i in (0, 2, 3)] == pytest.approx([0.5, 154 / 192, 0.0])


def test_an_allocation_for_each_layer(tmp_path: Path) -> None:
    path = written(tmp_path, group('allocation: {"0": 0.25, "re:[23]": 0.5}'))
    model = sparsify.apply(sparsify.convert(net()), sparsify.load_recipe(path))
    assert [model[i].sparsity for i in (0, 2, 3)] == [0.25, 0.5, 0.5]


#: What the model makes impossible; the message names the group, and the masks stay.
MISFITS = {
    "no such layer": ([{"sparsity": 0.5, "layers": ["nothing"]}], r"groups\.0: .*near names"),
    "excludes nothing": ([{"sparsity": 0.5, "exclude": ["nothing"]}], r"groups\.0: .*matches no layer"),
    "nothing left": ([{"sparsity": 0.5, "exclude": ["*"]}], r"groups\.0: "),
    "a layer twice": (
        [{"sparsity": 0.5}, {"sparsity": 0.6, "layers": ["3"]}],
        r"groups\.1: '3' is already in groups\.0",
    ),
    "N:M that does not divide": ([{"pattern": "3:5"}], r"groups\.0: 0: .*divisible by 5, got 16"),
    "blocks that do not divide": ([{"pattern": "5x1", "sparsity": 0.5}], r"groups\.0: 0: .*divisible by \(5, 1\)"),
    "an allocation with a gap": ([{"allocation": {"0": 0.5}}], r"groups\.0: .*says nothing for '2'"),
    "needs training": (
        [{"sparsity": 0.5, "schedule": {"kind": "linear", "end": 2, "every": 1}}],
        r"groups\.0: .*sparsify\.Pruner",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_recipe_that_does_not_fit_changes_nothing(name: str) -> None:
    groups, message = MISFITS[name]
    recipe, model = Recipe(groups=groups), sparsify.convert(net())
    with pytest.raises(ValueError, match=message):
        sparsify.apply(model, recipe)
    assert all(layer.mask.all() for layer in model if isinstance(layer, SparseLinear))


def test_a_weight_that_is_not_finite_stops_the_whole_recipe() -> None:
    model = sparsify.convert(net())
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="3: the weight holds NaN"):
        sparsify.apply(model, Recipe(groups=[{"sparsity": 0.5, "layers": ["0"]}, {"sparsity": 0.5, "exclude": ["0"]}]))
    assert all(layer.mask.all() for layer in model if isinstance(layer, SparseLinear))


def test_a_model_that_is_not_converted() -> None:
    with pytest.raises(ValueError, match=r"call sparsify\.convert\(model\) first"):
        sparsify.apply(net(), Recipe(groups=[{"sparsity": 0.5}]))

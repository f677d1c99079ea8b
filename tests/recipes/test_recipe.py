"""Recipes: each mistake gives one RecipeError with file, line, key and nearest word; the files in recipes/ work."""

import contextlib
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify import Pruner, Recipe, RecipeError, SparseLinear
from sparsify.recipes.dry_run import plan

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 4))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def group(*lines: str) -> str:
    return "groups:\n  - " + "\n    ".join(lines) + "\n"


#: The text, the line and key that the error names, and words of its message.
MISTAKES: dict[str, tuple[str, str, str]] = {
    "unknown key": (group("sparsity: 0.5", "methd: random"), "line 3, groups.0.methd", "did you mean 'method'?"),
    "unknown key far from any": (group("sparsity: 0.5", "zzz: 1"), "line 3, groups.0.zzz", "known: layers, exclude"),
    "unknown top key": ("versoin: 1\n" + group("sparsity: 0.5"), "line 1, versoin", "did you mean 'version'?"),
    "unknown schedule key": (
        group("sparsity: 0.5", "schedule:", "  kind: linear", "  ende: 3", "  every: 1"),
        "line 5, groups.0.schedule.ende",
        "did you mean 'end'?",
    ),
    "unknown method": (
        group("sparsity: 0.5", "method: magnitud"),
        "line 3, groups.0.method",
        "did you mean 'magnitude'?",
    ),
    "unknown allocation": (group("sparsity: 0.5", "allocation: globl"), "line 3, groups.0.allocation", "'global'?"),
    "unknown kind": (
        group("sparsity: 0.5", "schedule:", "  kind: polinomial", "  end: 3", "  every: 1"),
        "line 4, groups.0.schedule.kind",
        "did you mean 'polynomial'?",
    ),
    "unknown unit": (
        group("sparsity: 0.5", "schedule:", "  kind: linear", "  unit: epoch", "  end: 3", "  every: 1"),
        "line 5, groups.0.schedule.unit",
        "did you mean 'epochs'?",
    ),
    "unknown pattern": (group("sparsity: 0.5", "pattern: 4x"), "line 3, groups.0.pattern", 'blocks such as "4x1"'),
    "N:M of nothing": (group('pattern: "4:4"'), "line 2, groups.0.pattern", "N < M"),
    "sparsity above 1": (group("sparsity: 90"), "line 2, groups.0.sparsity", "between 0 and 1, got 90"),
    "sparsity below 0": (group("sparsity: -0.1"), "line 2, groups.0.sparsity", "between 0 and 1, got -0.1"),
    "sparsity NaN": (group("sparsity: .nan"), "line 2, groups.0.sparsity", "between 0 and 1, got nan"),
    "sparsity infinite": (group("sparsity: .inf"), "line 2, groups.0.sparsity", "between 0 and 1, got inf"),
    "sparsity as text": (group('sparsity: "0.5"'), "line 2, groups.0.sparsity", "valid number"),
    "sparsity true": (group("sparsity: yes"), "line 2, groups.0.sparsity", "valid number"),
    "sparsity as a list": (group("sparsity: [0.5]"), "line 2, groups.0.sparsity", "valid number"),
    "no sparsity": (group("method: random"), "line 2, groups.0", "a sparsity is needed"),
    "N:M with another sparsity": (group('pattern: "2:4"', "sparsity: 0.7"), "line 2, groups.0", "means sparsity 0.5"),
    "N:M with a ramp": (
        group('pattern: "2:4"', "schedule: {kind: linear, end: 3, every: 1}"),
        "line 2, groups.0",
        "must be constant, one-shot or",
    ),
    "N:M with an allocation": (group('pattern: "2:4"', "allocation: global"), "line 2, groups.0", "has no effect"),
    "steps that miss the target": (
        group("sparsity: 0.5", "schedule: {kind: steps, points: [[0, 0.1], [5, 0.4]]}"),
        "line 2, groups.0",
        "the last of the schedule's points must be the target",
    ),
    "steps out of order": (
        group("sparsity: 0.5", "schedule: {kind: steps, points: [[5, 0.1], [0, 0.5]]}"),
        "groups.0.schedule",
        "in order of time",
    ),
    "steps without points": (group("sparsity: 0.5", "schedule: {kind: steps}"), "line 3, groups.0.schedule", "points"),
    "a point above 1": (
        group("sparsity: 0.5", "schedule: {kind: steps, points: [[0, 1.5], [5, 0.5]]}"),
        "groups.0.schedule",
        "between 0 and 1",
    ),
    "a start above the target": (
        group("sparsity: 0.5", "schedule: {kind: linear, initial: 0.8, end: 3, every: 1}"),
        "line 2, groups.0",
        "initial 0.8 lies above the target 0.5",
    ),
    "an end before the start": (
        group("sparsity: 0.5", "schedule: {kind: linear, start: 3, end: 2, every: 1}"),
        "line 3, groups.0.schedule",
        "'end' after its start",
    ),
    "no end": (group("sparsity: 0.5", "schedule: {kind: linear, every: 1}"), "groups.0.schedule", "needs an 'end'"),
    "no every": (group("sparsity: 0.5", "schedule: {kind: linear, end: 1}"), "groups.0.schedule", "needs 'every'"),
    "a quoted time": (
        group("sparsity: 0.5", "schedule: {kind: one-shot, start: '3'}"),
        "groups.0.schedule",
        "must be a number, got '3'",
    ),
    "a time that is true": (
        group("sparsity: 0.5", "schedule: {kind: linear, end: 1, every: true}"),
        "groups.0.schedule",
        "'every' must be a number",
    ),
    "every 0": (group("sparsity: 0.5", "schedule: {kind: linear, end: 1, every: 0}"), "groups.0.schedule", "'every'"),
    "every tiny": (
        group("sparsity: 0.5", "schedule: {kind: linear, end: 1.0e+9, every: 1.0e-9}"),
        "groups.0.schedule",
        "million",
    ),
    "an infinite end": (
        group("sparsity: 0.5", "schedule: {kind: linear, end: .inf, every: 1}"),
        "groups.0.schedule",
        "'end'",
    ),
    "a key of another kind": (
        group("sparsity: 0.5", "schedule: {kind: constant, start: 3}"),
        "groups.0.schedule",
        "'start' has no effect",
    ),
    "a schedule as a word": (group("sparsity: 0.5", "schedule: linear"), "line 3, groups.0.schedule", "dictionary"),
    "exponential to 1": (
        group("sparsity: 1", "schedule: {kind: exponential, end: 3, every: 1}"),
        "line 2, groups.0",
        "cannot reach",
    ),
    "a seed that nobody draws with": (group("sparsity: 0.5", "seed: 1"), "line 2, groups.0", "'seed' has no effect"),
    "a seed as a fraction": (group("sparsity: 0.5", "method: random", "seed: 1.5"), "line 4, groups.0.seed", "integer"),
    "an allocation above 1": (group('allocation: {"*": 2}'), "line 2, groups.0", "the sparsity of '*' must be"),
    "sparsity beside an allocation": (
        group("sparsity: 0.5", 'allocation: {"*": 0.2}'),
        "line 2, groups.0",
        "has no effect beside an allocation",
    ),
    "layers as a word": (group("sparsity: 0.5", 'layers: "*"'), "line 3, groups.0.layers", "list"),
    "a layer that is no word": (group("sparsity: 0.5", "layers: [1]"), "line 3, groups.0.layers.0", "string"),
    "no groups": ("version: 1\n", "line 1, groups", "the key 'groups' is missing"),
    "empty groups": ("groups: []\n", "line 1, groups", "at least 1"),
    "groups as a mapping": ("groups: {a: 1}\n", "line 1, groups", "list"),
    "an empty group": ("groups:\n  -\n", "line 2, groups.0", "dictionary"),
    "version 2": ("version: 2\n" + group("sparsity: 0.5"), "line 1, version", "1"),
    "the second of two groups": (
        group("sparsity: 0.5") + "  - sparsity: 0.5\n    method: foo\n",
        "line 4, groups.1.method",
        "no method 'foo'",
    ),
    # variables
    "an unknown variable": (
        "vars: {target: 0.5}\ngroups:\n  - sparsity: ${target}\n    method: ${targt}\n",
        "line 4, groups.0.method",
        "did you mean 'target'?",
    ),
    "an unused variable": ("vars:\n  a: 0.5\n" + group("sparsity: 0.5"), "line 2, vars.a", "used nowhere"),
    "a variable inside a word": (
        group("sparsity: 0.5", 'layers: ["a.${n}"]'),
        "line 3, groups.0.layers.0",
        "stands alone",
    ),
    "a bad value in a variable": ("vars: {s: 3}\n" + group("sparsity: ${s}"), "line 3, groups.0.sparsity", "got 3"),
    "variables as a list": ("vars: [1]\n" + group("sparsity: 0.5"), "line 1, vars", "mapping"),
    # YAML
    "a key twice": (group("sparsity: 0.5", "sparsity: 0.6"), "line 3", "'sparsity' stands twice"),
    "an anchor": (group("sparsity: &a 0.5"), "line 2", "anchors, aliases and tags are not read"),
    "an alias": (group("sparsity: *a"), "line 2", "anchors, aliases and tags are not read"),
    "a merge": (group("sparsity: 0.5", "<<: {method: random}"), "line 3, groups.0.<<", "unknown key '<<'"),
    "a tag": (group("sparsity: !!float 1"), "line 2", "anchors, aliases and tags are not read"),
    "a tag that would run": ('groups: !!python/object/apply:os.system ["exit 1"]\n', "line 1", "tags are not read"),
    "a list as a key": (group("sparsity: 0.5", "[a, b]: 1"), "line 3", "a key must be a plain word"),
    "a tab": ("groups:\n\t- sparsity: 0.5\n", "line 2", "no valid YAML"),
    "an open quote": (group('method: "random'), "line 3", "no valid YAML"),
    "two documents": (group("sparsity: 0.5") + "---\na: 1\n", "line 3", "no valid YAML"),
    "an empty file": ("", "line 1", "a recipe is a mapping"),
    "a list": ("- 1\n", "line 1", "a recipe is a mapping"),
    "a word": ("hello\n", "line 1", "a recipe is a mapping"),
    "a control character": ("a: \x01\n", "", "no valid YAML"),
    "deep lists": ("[" * 100_000, "line 1", "levels deep"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(900)), "line 51", "levels deep"),
    "an integer of 5000 digits": (
        group("sparsity: 0.5", "method: random", "seed: " + "9" * 5000),
        "line 4",
        "cannot read a number of 5000 characters",
    ),
    "recover for ever": (group("sparsity: 0.5") + "recover: {seconds: .inf}", "recover.seconds", "finite number"),
    "an infinite learning rate": (
        group("sparsity: 0.5") + "recover: {steps: 1, lr: 1e999}",
        "recover.lr",
        "finite number",
    ),
    "an infinite decay": (group("sparsity: 0.5", "decay: .inf"), "groups.0.decay", "finite number"),
    "a seed of 70 bits": (group("sparsity: 0.5", f"method: random\n    seed: {2**70}"), "groups.0.seed", "less than"),
    "too many groups": ("groups:\n" + "  - {sparsity: 0.5}\n" * 1001, "line 1, groups", "at most 1000 items"),
    "too many values": (group("sparsity: 0.5", "layers: [" + "a," * 60_000 + "]"), "line 3", "over 50000 values"),
    "too many values through variables": (
        group("sparsity: 0.5") + "  - ${g}\n" * 400 + "vars: {g: {layers: [" + "a," * 200 + "]}}",
        "groups.247",
        "over 50000 values, with its variables put in",
    ),
}


#: Each took minutes to read: regular expressions that go back, variables that each look at the whole recipe.
SLOW = {
    "40,000 digits": group("sparsity: " + "9" * 40_000),
    "a million hexadecimal digits": group("sparsity: 0x" + "f" * 1_000_000),
    "5,000 variables": group("sparsity: 0.5", "layers: [" + ", ".join(f"'${{a{i}}}'" for i in range(5000)) + "]")
    + "vars:\n"
    + "".join(f"  a{i}: x\n" for i in range(5000)),
    "long unknown words": group("sparsity: 0.5", f"method: {'ab' * 100_000}"),
}


@pytest.mark.parametrize("name", SLOW)
def test_no_recipe_takes_long_to_read(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, SLOW[name])
    started = time.process_time()
    with contextlib.suppress(RecipeError):
        sparsify.load_recipe(path)
    assert time.process_time() - started < 3


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_file_line_key_and_what_is_meant(tmp_path: Path, name: str) -> None:
    text, place, words = MISTAKES[name]
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        sparsify.load_recipe(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert place in message
    assert words in message
    assert "pydantic" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for missing in (tmp_path / "nothing.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match="no recipe"):
            sparsify.load_recipe(missing)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="no valid YAML"):
        sparsify.load_recipe(path)
    path.write_text("#" * (1 << 20) + "\ngroups: [{sparsity: 0.5}]")
    with pytest.raises(RecipeError, match="over 1048576 bytes"):
        sparsify.load_recipe(path)


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


# The files in recipes/


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
    layers = [layer for layer in model if isinstance(layer, SparseLinear)]
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
        assert len({layer.sparsity for layer in layers}) > 1
    assert all(torch.count_nonzero(layer.weight[~layer.mask]) == 0 for layer in layers)
    if group.allocation == "global" and group.method != "magnitude":
        return  # how the layers share depends on what training shows
    for x in plan(recipe, net()):
        sparsity = model.get_submodule(x.name).sparsity
        assert (x.ranked and group.trains) or x.targets[-1][1] == pytest.approx(sparsity)


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

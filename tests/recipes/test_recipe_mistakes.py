"""Each mistake in a recipe gives one RecipeError with file, line, key and the meant word."""

import contextlib
import time
from pathlib import Path

import pytest
from recipe_files import group, written

import sparsify
from sparsify import RecipeError

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

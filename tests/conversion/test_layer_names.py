"""Layers are chosen by glob, `re:` pattern or type; what matches nothing is an error that helps."""

import re

import pytest
from torch import nn

from sparsify.layer_names import MAX_LETTERS, Selector, matching, select


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(2, 2), nn.Linear(2, 2)


def model() -> nn.Module:
    blocks = [nn.ModuleDict({"attention": Attention(), "fc": nn.Linear(2, 2)}) for _ in range(2)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(2, 2)})


NAMES = [f"blocks.{i}.{name}" for i in range(2) for name in ("attention.query", "attention.key", "fc")] + ["head"]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (None, None, NAMES),
        ("*", None, NAMES),
        ("head", None, ["head"]),
        (["head", "blocks.0.fc"], None, ["blocks.0.fc", "head"]),  # in the model's order
        (("*.query",), None, ["blocks.0.attention.query", "blocks.1.attention.query"]),
        ("blocks.1.*", "*.key", ["blocks.1.attention.query", "blocks.1.fc"]),
        (r"re:blocks\.\d\.fc", None, ["blocks.0.fc", "blocks.1.fc"]),
        (None, ["re:.*(query|key)", "head"], ["blocks.0.fc", "blocks.1.fc"]),
        (Attention, None, [name for name in NAMES if "attention" in name]),
        (None, Attention, ["blocks.0.fc", "blocks.1.fc", "head"]),
        (nn.Linear, None, NAMES),
        ([Attention, "head"], "*.key", ["blocks.0.attention.query", "blocks.1.attention.query", "head"]),
    ],
)
def test_select(include: Selector | list[Selector] | None, exclude: Selector | None, chosen: list[str]) -> None:
    net = model()
    assert select(net, linears(net), include, exclude) == chosen


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("haed", None, "'haed' matches no layer; near names: 'head'"),
        (None, "haed", "'haed' matches no layer; near names: 'head'"),
        (["head", "blocks.0.fcc"], None, r"'blocks\.0\.fcc' matches no layer; near names: 'blocks\.0\.fc'"),
        ("blocks.0", None, r"for the 3 layers inside 'blocks\.0' write 'blocks\.0\.\*'"),
        ("HEAD", None, "matches no layer"),
        (r"re:blocks\.\d", None, r"matches no layer; near names: "),  # a regular expression is for the whole name
        ("re:(", None, "is no valid regular expression: missing \\)"),
        ("re:" + "(" * 5000 + ")" * 5000, None, "has too many brackets in brackets"),
        (
            "re:" + "a" * (MAX_LETTERS + 1),
            None,
            f"over {MAX_LETTERS} letters with its repetitions written out",
        ),
        ("re:(a{999}b){999}", None, "letters with its repetitions written out; write a shorter one"),
        (nn.Conv2d, None, "type Conv2d matches no layer; the model has: Attention, Linear, ModuleDict, ModuleList"),
        (None, nn.Conv2d, "type Conv2d matches no layer"),
        ("head", "*", "include='head' and exclude='.' leave no layer"),
        ([], None, "leave no layer"),
    ],
)
def test_a_selector_that_matches_nothing_helps(
    include: Selector | list[Selector] | None, exclude: Selector | None, message: str
) -> None:
    net = model()
    with pytest.raises(ValueError, match=message):
        select(net, linears(net), include, exclude)


@pytest.mark.parametrize("text", [r".*(\w)\1.*", "(?>head)", "h*+ead", "(h)?(?(1)ead|blocks.*fc)", "(?<=^)head"])
def test_an_expression_means_what_it_means_to_re(text: str) -> None:
    assert matching(f"re:{text}", NAMES) == [name for name in NAMES if re.fullmatch(text, name)] != []


@pytest.mark.parametrize("text", ["(a|a)*[bd]", "(?:a|aa)+[bd]", r"(.*)(.*)(.*)(.*)(.*)(.*)\6[bd]"])
def test_an_expression_that_would_take_years_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.layer_names.MAX_MATCH_S", 0.05)
    with pytest.raises(ValueError, match=r"takes more than 0\.05 s to match; write it without repetitions in repet"):
        matching(f"re:{text}", ["a" * 200 + "c"] * 1000)


@pytest.mark.parametrize("selector", [3, nn.Linear(2, 2), str, [None]])
def test_a_selector_is_a_pattern_a_module_type_or_a_function(selector: object) -> None:
    net = model()
    with pytest.raises(TypeError, match=r"a pattern, a module type or a function .* selects layers, got"):
        select(net, linears(net), selector)  # type: ignore[arg-type]


def test_a_shared_layer_answers_to_each_of_its_names() -> None:
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"a": shared, "b": nn.Linear(2, 2), "c": shared})
    assert select(net, linears(net), "c") == ["a"]
    assert select(net, linears(net), None, "c") == ["b"]


def test_the_root_has_an_empty_name() -> None:
    root = nn.Linear(2, 2)
    assert [select(root, linears(root), include) for include in ("*", "", nn.Linear, None)] == [[""]] * 4


def test_there_may_be_nothing_to_choose_from() -> None:
    assert select(nn.ReLU(), {}) == []
    with pytest.raises(ValueError, match="there is no layer to choose from"):
        select(nn.ReLU(), {}, "fc")


def test_matching_keeps_the_order_of_the_names() -> None:
    assert matching("?", ["b", "a", "ab"]) == ["b", "a"]
    assert matching("[ab]", ["b", "a", "ab"]) == ["b", "a"]

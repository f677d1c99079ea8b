"""The public interface keeps all that it had before the package had sub-packages; more may come."""

import json
from pathlib import Path

import pytest
from interface import interface

KEPT = json.loads((Path(__file__).parents[1] / "data" / "interface.json").read_text())
NOW = interface()


@pytest.mark.parametrize("name", KEPT["signatures"])
def test_signatures_are_kept(name: str) -> None:
    """Parameters keep name, kind, default and order; what is new comes by keyword only."""
    kept, now = KEPT["signatures"][name], NOW["signatures"][name]
    assert [parameter for parameter in now if parameter in kept] == kept
    new = [parameter for parameter in now if parameter not in kept]
    assert all(": keyword-only = " in parameter for parameter in new), new


@pytest.mark.parametrize("section", ["options", "recipe"])
def test_words_are_kept(section: str) -> None:
    for name, words in KEPT[section].items():
        assert set(words) <= set(NOW[section][name]), name


def test_nothing_is_missed() -> None:
    """The checks above would pass if the snapshot held nothing."""
    assert len(KEPT["signatures"]) >= 40
    assert "sparsity: positional or keyword = None" in KEPT["signatures"]["prune"]
    assert {"--sparsity", "--stream", "--resume"} <= set(KEPT["options"]["compress"])
    assert {"groups", "recover"} <= set(KEPT["recipe"]["Recipe"])

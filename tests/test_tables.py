"""Tables fit a width, and every printed result goes through them."""

import sys

import pytest
import torch
from torch import nn

import sparsify
from sparsify import Recipe
from sparsify.cli.printing import show
from sparsify.hardware.timing import Timing
from sparsify.pruning.sensitivity import Sensitivity
from sparsify.recipes.dry_run import plan
from sparsify.reporting.model_bench import LayerBench, ModelBench
from sparsify.tables import FEWEST_LETTERS, Listed, Table


def deep() -> nn.Module:
    """Three layers with long names, the last of a kind that stays dense."""
    inner = nn.ModuleDict({"intermediate_projection": nn.Linear(512, 256), "output_projection": nn.Linear(256, 512)})
    outer = nn.ModuleDict(
        {"encoder_with_attention": inner, "head": nn.utils.parametrizations.weight_norm(nn.Linear(9, 9))}
    )
    return nn.ModuleDict({"transformer": outer})


def results() -> dict[str, Listed]:
    """One result of each command with a table."""
    timing = Timing(1e-3, 1e-3, 2e-3, 7)
    names = [name for name, module in deep().named_modules() if type(module) is nn.Linear][:2]
    why = "5.00x dense for 64 tokens (60 of 300 us), taken for its memory"
    layers = [LayerBench(name, (512, 256), 64, "panel", 1234.0, 567.0, why) for name in names]
    schedule = {"kind": "linear", "start": 0, "end": 90, "every": 1}
    recipe = Recipe(groups=[{"sparsity": 0.9, "allocation": "global", "schedule": schedule, "layers": names}])
    model = sparsify.convert(deep(), include=names)
    return {
        "inspect": sparsify.inspect(deep()),
        "plan": plan(recipe, deep()),
        "bench": ModelBench(0.9, 64, "a machine", timing, timing, tuple(layers), 0.0),
        "sensitivity": Sensitivity(
            (0.4, 0.5, 0.6, 0.7, 0.8, 0.9), {n: (0.1,) * 6 for n in names}, dict.fromkeys(names, 9)
        ),
        "report": sparsify.report(sparsify.export(sparsify.prune(model, 0.9), format="csr")),
    }


RESULTS = results()


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("width", [80, 60])
def test_a_result_fits_a_terminal_with_its_summary_first(name: str, width: int) -> None:
    listing = RESULTS[name].listing()
    text = listing.text(width)
    assert max(map(len, text.splitlines())) <= width
    assert text.splitlines()[0].startswith(listing.summary[0][:20])
    whole = str(RESULTS[name])
    assert whole == listing.text()
    assert "transformer.encoder_with_attention.intermediate_projection" in whole
    assert "left out" not in whole
    html = RESULTS[name]._repr_html_()
    assert html.startswith("<p>")
    assert html.count("<tr>") == sum(1 + len(table.rows) for _, table in listing.tables)


def test_words_are_cut_before_columns_go_and_numbers_stay() -> None:
    table = Table(("layer", "a", "b", "n"), [("x" * 40, "1" * 10, "2" * 10, "3" * 10)], spare=("b", "a"))
    row = table.text(60).splitlines()[2]  # 24 letters and 3 numbers
    assert len(row) == 60
    assert row.count("2") == 10
    lines = table.text(59).splitlines()
    assert lines[0].split() == ["layer", "a", "n"]
    assert lines[-1] == "left out for the width: b"
    assert len(table.text(30).splitlines()[2]) == 30
    narrow = table.text(10).splitlines()  # the last number is never cut
    assert len(narrow[2]) == FEWEST_LETTERS + 2 + 10
    assert table.text().splitlines()[2].split() == list(table.rows[0])


class Screen:
    """Standard output that says that it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        """Have nothing to write."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rich", [True, False])
def test_escape_codes_are_for_terminals_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rich: bool
) -> None:
    listing = RESULTS["report"].listing()
    if rich:
        pytest.importorskip("rich.console")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    show(listing, "first")
    assert capsys.readouterr().out == "first\n" + listing.text() + "\n"
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    show(listing, "first")
    assert ("\x1b[" in screen.text) == rich
    if rich:
        assert screen.text.startswith("\x1b[1mfirst\x1b[0m\n")
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setattr(sys, "stdout", screen := Screen())
        show(listing, "first")
    assert screen.text == "first\n" + listing.text(70) + "\n"


def test_a_model_without_layers_has_a_table_without_rows() -> None:
    assert str(sparsify.report(nn.ReLU())).startswith("total: 0 layers, 0 weights")
    assert "layer" in str(sparsify.inspect(nn.ReLU(), torch.zeros(2)))

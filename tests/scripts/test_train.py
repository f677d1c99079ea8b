"""scripts/train.py: every row runs from its recipe to its target, is continued where it stopped, and reported."""

import json
from pathlib import Path

import pytest
import torch
import train
from torch import nn
from training import data, page, rows, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[data.Examples, data.Examples]:
    """Train on few random images: the rows' schedules stay as they are."""
    generator = torch.Generator().manual_seed(0)
    examples = torch.randn(40, 784, generator=generator), torch.randint(10, (40,), generator=generator)
    monkeypatch.setattr(run, "BATCH", 20)
    monkeypatch.setitem(run.MODELS, "mlp", lambda: nn.Sequential(nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10)))
    monkeypatch.setattr(data, "load", lambda: (examples, examples))
    return examples, examples


@pytest.mark.parametrize("row", [name for name, row in rows.ROWS.items() if row is not None and not row.after])
def test_a_row_reaches_its_target(row: str, small: tuple[data.Examples, data.Examples]) -> None:
    (result,) = run.run(row, 0.95, 0, small)
    assert result["zeros"] == pytest.approx(0.95, abs=1e-3)
    assert (result["row"], result["epochs"]) == (row, rows.EPOCHS)


def test_a_vision_transformer_is_pruned_with_its_attention(small: tuple[data.Examples, data.Examples]) -> None:
    (result,) = run.run("gradual magnitude", 0.9, 0, small, "vit")
    assert result["zeros"] == pytest.approx(0.9, abs=1e-3)
    assert (
        result["weights"] > 4 * 8 * 96 * 96
    )  # four layers: attention in and out, two feed-forward layers of 2 x width


def test_runs_are_made_once_and_reported(
    tmp_path: Path, small: tuple[data.Examples, data.Examples], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs.jsonl"
    arguments = ["--results", str(file), "row", "dense", "--seed", "0"]
    assert train.main(arguments) == 0
    n_runs = len(file.read_text().splitlines())
    assert n_runs == 1 + len(rows.SPARSITIES)  # and the rows that prune the dense model when it is done
    assert train.main(arguments) == 0
    assert len(file.read_text().splitlines()) == n_runs
    found = [json.loads(line) for line in file.read_text().splitlines()]
    pytest.importorskip("matplotlib")
    page.write(found, tmp_path)
    text = (tmp_path / "training.md").read_text()
    assert f"| dense, 0% | {100 * found[0]['accuracy']:.2f} |" in text
    assert "one-shot magnitude" in text
    assert (tmp_path / "training.svg").read_text().startswith("<?xml")

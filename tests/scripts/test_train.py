"""scripts/train.py: every row runs from its recipe to its target, is continued where it stopped, and reported."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train
from torch import nn
from training import data, page, rows, run, tasks, text
from training.models import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[data.Examples, data.Examples]:
    """Train on few random images: the rows' schedules stay as they are."""
    generator = torch.Generator().manual_seed(0)
    examples = torch.randn(40, 784, generator=generator), torch.randint(10, (40,), generator=generator)
    mlp = lambda: nn.Sequential(nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))  # noqa: E731
    for name, task in tasks.TASKS.items():
        model = mlp if name == "mlp" else task.model
        small = replace(task, batch=20, load=lambda: (examples, examples), model=model)
        monkeypatch.setitem(tasks.TASKS, name, small)
    return examples, examples


@pytest.mark.parametrize(
    "row",
    [
        name
        for name, row in rows.ROWS.items()
        if row is not None and not row.after and row.recipe != "cnn-gradual-90" and "exclude" not in row.variables
    ],
)
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


def test_a_resnet_is_pruned_but_for_its_first_and_last_layer(small: tuple[data.Examples, data.Examples]) -> None:
    (result,) = run.run("gradual magnitude, CNN recipe", 0.9, 0, small, "resnet")
    n_spared = 16 * 9 + 96 * 10
    assert result["zeros"] == pytest.approx(0.9 * (result["weights"] - n_spared) / result["weights"], abs=1e-3)
    assert result["epochs"] == tasks.TASKS["resnet"].epochs


def test_a_language_model_is_pruned_with_its_lstm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "corpus.tgz", "w:gz") as tar:
        for number in range(20):
            content = " ".join(f"Word{(number * i) % 7}/nn ./." for i in range(40)).encode()
            member = tarfile.TarInfo(f"package/ca{number:02}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    examples = text.load(tmp_path)
    assert examples[0][0].shape == (4 * 80 // text.LENGTH - 1, text.LENGTH)  # four of twenty files
    assert torch.equal(examples[0][0].view(-1)[1:], examples[0][1].view(-1)[:-1])
    assert int(examples[1][0].max()) < 9  # seven words, a full stop, and unknown ones
    lstm = replace(tasks.TASKS["lstm"], model=lambda: LanguageModel(9, 8, 16), batch=4, epochs=2)
    monkeypatch.setitem(tasks.TASKS, "lstm", lstm)
    dense, *_ = run.run("dense", 0.0, 0, examples, "lstm")
    (result,) = run.run("gradual magnitude", 0.8, 0, examples, "lstm")
    assert result["zeros"] == pytest.approx(0.8, abs=1e-3)
    assert result["weights"] == 4 * 16 * (8 + 16) + 16 * 9
    assert 1 < result["perplexity"] < 20 > dense["perplexity"]


@pytest.mark.parametrize("model", ["lstm", "lstm-wide"])
def test_a_language_model_is_pruned_but_for_its_last_layer(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = torch.randint(9, (8, text.LENGTH), generator=torch.Generator().manual_seed(0))
    small = replace(tasks.TASKS[model], model=lambda: LanguageModel(9, 8, 16), batch=4, epochs=2)
    monkeypatch.setitem(tasks.TASKS, model, small)
    (result,) = run.run("gradual magnitude, last layer spared", 0.8, 0, ((words, words), (words, words)), model)
    n_lstm, n_head = 4 * 16 * (8 + 16), 16 * 9
    assert result["weights"] == n_lstm + n_head
    assert result["zeros"] == pytest.approx(0.8 * n_lstm / (n_lstm + n_head), abs=1e-3)
    assert result["parameters"] == n_lstm + n_head + 9 * 8 + 2 * 4 * 16 + 9  # and the embedding and the biases
    pytest.importorskip("matplotlib")
    page.write([{"row": "dense", "sparsity": 0.0, "accuracy": 0.9, "model": "mlp"}, result], tmp_path)
    lines = (tmp_path / "training.md").read_text().splitlines()
    shares = [line for line in lines if "last layer spared, 80%: " in line]
    share = result["zeros"] * result["weights"] / result["parameters"]
    assert len(shares) == 1
    assert shares[0].endswith(f"spared ones too, {result['zeros']:.1%}; in all parameters {share:.1%}")


def test_runs_are_made_once_and_reported(
    tmp_path: Path, small: tuple[data.Examples, data.Examples], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs.jsonl"
    arguments = ["--results", str(file), "row", "dense", "--seed", "0"]
    assert train.main(arguments) == 0
    n_runs = len(file.read_text().splitlines())
    assert n_runs == 1 + len(tasks.TASKS["mlp"].sparsities)  # and the rows that prune the dense model when it is done
    assert train.main(arguments) == 0
    assert len(file.read_text().splitlines()) == n_runs
    found = [json.loads(line) for line in file.read_text().splitlines()]
    pytest.importorskip("matplotlib")
    page.write(found, tmp_path)
    text = (tmp_path / "training.md").read_text()
    assert f"| dense, 0% | {100 * found[0]['accuracy']:.2f} |" in text
    assert "one-shot magnitude" in text
    assert (tmp_path / "training.svg").read_text().startswith("<?xml")

"""Runs of scripts/bench.py: a run that is cut off keeps its rows, and candidates can be left out."""

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is missing: pip install 'sparsify-torch[hf]'")

import bench as script
from benchmarks import isa, layers, models, page, record
from tested_kernels import needs_native
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def row(candidate, median_us, sparsity=None):
    times = {"median_us": median_us, "low_us": 0.9 * median_us, "high_us": 1.1 * median_us, "n": 11}
    cell = {"shape": [768, 768], "tokens": 16, "group": layers.CACHED, "form": "", "copies": 1, "error": 0.0}
    return {"candidate": candidate, "sparsity": sparsity, **cell, **times}


ROWS = [row("torch fp32", 90.0), row("sparsify", 10.0, 0.5), row("sparsify", 8.0, 0.9)]


@needs_native
def test_a_run_that_is_cut_off_keeps_its_rows_and_says_so(tmp_path, monkeypatch):
    def two_rows(*_, **__):
        yield ROWS[0]
        yield ROWS[1]
        raise RuntimeError("the machine went away")

    monkeypatch.setattr(layers, "run", two_rows)
    monkeypatch.setattr(isa, "check_peers", lambda: None)
    assert script.main(["layers", "--json", str(tmp_path)]) == 2
    (file,) = tmp_path.iterdir()
    kept = record.read(file)
    assert kept["rows"] == ROWS[:2]
    assert "Not measured: what comes after the last row (the run was cut off)." in page.page({file.stem: kept})
    monkeypatch.setattr(layers, "run", lambda *_, **__: iter(ROWS))
    assert script.main(["layers", "--json", str(tmp_path)]) == 0
    assert record.read(file)["rows"] == ROWS
    assert not set(script.UNFINISHED) & set(record.read(file)["absent"])


def test_models_without_some_of_their_candidates(monkeypatch, capsys):
    tiny = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 64)).eval()
    monkeypatch.setattr(models, "_build", lambda name: tiny)
    without = set(models.CAN_BE_LEFT_OUT) - {"torch int8", layers.INT8}
    rows = models.bench_models({"vit_b_16": (1,)}, (0.9,), rounds=1, without=without)
    assert [r["candidate"] for r in rows] == [models.TORCH, "torch int8", layers.INT8]
    assert script.main(["models", "--without", models.TORCH]) == 2
    assert "--without 'torch fp32': none of the peers that can be left out: torch bf16, " in capsys.readouterr().err

"""Benchmarks of several processes: beside a busy one, on either team of threads, and of a model outside of Python."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is missing: pip install 'sparsify-torch[hf]'")

from benchmarks import deployed, load, record, tables, teams
from benchmarks.cases import Grid
from benchmarks.processes import Process
from tested_kernels import needs_native
from torch import nn

import sparsify

pytestmark = pytest.mark.usefixtures("one_thread")


def run_record(name, rows):
    result = record.describe(name, [name, "--quick"])
    result["machine"]["others_cores"] = 0.0
    return result | {"rows": list(rows), "roofs": {}}


@needs_native
def test_load_end_to_end(monkeypatch):
    monkeypatch.setattr(load, "N_CALLS", 50)
    result = run_record("load", load.run(Grid(((96, 64),), (1,), (0.9,))))
    assert [r["busy"] for r in result["rows"]] == [False, False, True, True]
    assert all(r["p99_us"] >= r["median_us"] for r in result["rows"])
    assert len(next(iter(tables.tables(result).values()))) == 3


@needs_native
def test_teams_end_to_end(monkeypatch):
    monkeypatch.setattr(teams, "CALLS_OF_ROUND", 20)
    result = run_record("teams", teams.run(Grid(((96, 64),), (1, 16), (0.9,), rounds=2)))
    found = [(r["candidate"], r["tokens"], r["busy"], r["n"]) for r in result["rows"]]
    assert found == [(team, n, busy, 40) for n in (1, 16) for busy in (False, True) for team in teams.TEAMS]
    [table] = tables.tables(result).values()
    assert len(table) == 1 + 4 + 2
    assert "(1.05)" in table[-2][6]
    assert "(1)" in table[-1][8]


@needs_native
def test_deployed_end_to_end(monkeypatch):
    """Without a package, whose making takes half a minute: tests/deployment runs one."""

    def write(place):
        layer = sparsify.prune(sparsify.convert(nn.Linear(64, 96)), 0.8).eval()
        torch.save(sparsify.export(layer, format="panel"), place / "model.pt")
        torch.save((torch.ones(3, 64),), place / "inputs.pt")

    monkeypatch.setattr(deployed, "_write", write)
    monkeypatch.setattr(deployed, "_WITHOUT_US", "for _ in sys.stdin: print([1e-9, 3e-9, 2e-9], flush=True)")
    monkeypatch.setattr(deployed, "_build", lambda _: Path("run_package"))
    monkeypatch.setattr(deployed, "_run", lambda program, place: 1.0)
    monkeypatch.setattr(deployed, "CALLS_OF_ROUND", 5)
    result = run_record("deployed", deployed.run(rounds=2))
    found = [(r["candidate"], r["n"]) for r in result["rows"]]
    assert found == [(name, 2) for name in (deployed.OURS, deployed.PACKAGE, deployed.PROGRAM)]
    [table] = tables.tables(result).values()
    assert table[1][2] == "1.00x"
    assert table[2][2].endswith("(1.05)")
    assert table[3][2].endswith("(1.05) *"), "far above"


def test_a_process_that_ends_is_an_error():
    with pytest.raises(RuntimeError, match="ended with status 3"):
        Process("sys.exit(3)").ask({})

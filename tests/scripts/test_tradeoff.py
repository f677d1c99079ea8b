"""scripts/tradeoff.py: quality on two texts with intervals, and what the page says of each point."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is missing: pip install 'sparsify-torch[hf]'")

import tradeoff
from tradeoff_points import page
from tradeoff_points.quality import Judge, _difference, _interval


def judge(news, passages):
    ratings = np.triu((news.double() @ news.double().T).numpy(), k=1)
    return Judge(["n"] * len(news), ratings, ["p"] * len(passages), np.repeat([0, 1], 2), news, passages)


def directions(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_figures_of_both_texts():
    dense = directions(0, 10, 90, 100)
    mine = judge(dense, dense)
    everything = np.arange(4)
    assert mine._lee(dense)(everything) == pytest.approx(1)
    assert mine._brown(dense)(everything) == 1  # the nearest is of the same file
    mixed = directions(0, 90, 10, 100)
    assert mine._brown(mixed)(everything) == 0
    assert mine._brown(directions(0, 10, 11, 100))(everything) == pytest.approx(0.5)
    assert _difference(mine._lee(dense), mine._lee(dense))(everything) == 0


def test_an_interval_is_around_its_figure_and_the_same_each_time():
    values = np.linspace(0, 1, 50)
    value, low, high = _interval(lambda drawn: float(values[drawn].mean()), 50)
    assert low < value == 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 50**0.5, rel=0.1)
    assert _interval(lambda drawn: float(values[drawn].mean()), 50) == [value, low, high]


def point(name, kind, mb, ms, lee, brown=0.8, **more):
    figures = {"lee": [lee, lee - 0.05, lee + 0.05], "brown": [brown, brown - 0.05, brown + 0.05]}
    changes = {f"{text}_change": [0.0, -0.01, 0.01] for text in figures} | {f"{text}_cosine": 1.0 for text in figures}
    machine = {"processor": "Some CPU (x86_64 1/2)", "isa": "avx512-vnni", "hidden": [], "machine": "some machine"}
    run = {"torch": "2", "threads": 2, "date": "2026-11-28", "others_cores": 0.0}
    times = {"ms_1": [ms / 20, ms / 20, ms / 20], "ms_32": [ms, ms, ms]}
    return {
        "point": name,
        "kind": kind,
        "file_bytes": mb * 1e6,
        **times,
        **figures,
        **changes,
        **machine,
        **run,
        **more,
    }


DENSE = [
    point("torch float32", "dense float32", 91, 700, 0.65),
    point("torch int8", "dense int8", 59, 250, 0.65),
    point("OpenVINO int8", "dense int8", 23, 200, 0.65),
]


def test_a_point_smaller_and_faster_than_dense_int8_is_told_with_its_quality():
    good = point("sparsify int8 70%", "sparsify int8", 18, 150, 0.63)
    poor = point("sparsify int8 90%", "sparsify int8", 15, 90, 0.4)
    slow = point("sparsify float32 50%", "sparsify float32", 60, 350, 0.65)
    lines = page.verdicts([*DENSE, good, poor, slow])
    assert "OpenVINO int8 at 32 (200 ms); smallest: OpenVINO int8 (23.0 MB)" in lines[0]
    assert "sparsify int8 70%; quality within the interval of dense int8 on both texts" in lines[1]
    assert "sparsify int8 90%; quality outside: Lee 0.400 below 0.600" in lines[2]
    assert len(lines) == 3


def test_the_loss_is_told_where_no_point_is_smaller_and_faster():
    lines = page.verdicts([*DENSE, point("sparsify float32 90%", "sparsify float32", 46, 220, 0.6)])
    assert lines[1].startswith("No pruned model is smaller and faster")
    assert "sparsify float32 90%: 2.00 of the smallest file" in lines[2]
    assert "1.10 at 32" in lines[2]
    assert page.verdicts(DENSE[:1]) == ["No dense int8 engine was measured."]


def test_a_point_that_is_faster_at_one_batch_size_is_told_with_it():
    one = point("sparsify int8 50%", "sparsify int8", 18, 150, 0.65, ms_1=[30, 30, 30])
    lines = page.verdicts([*DENSE, one])
    assert lines[1].startswith("No pruned model is smaller and faster than dense int8 at both")
    assert lines[2].startswith("Smaller and faster at 32 texts alone: sparsify int8 50%; quality within the interval")
    assert "3.00 of the shortest time at 1 text, 0.75 at 32" in lines[3]
    assert len(lines) == 4


def test_the_page_keeps_instruction_sets_apart_and_the_last_of_each_point(tmp_path):
    pytest.importorskip("matplotlib")
    old = point("torch float32", "dense float32", 91, 999, 0.65)
    avx2 = point("torch float32", "dense float32", 91, 1234, 0.65, isa="avx2", hidden=["avx512", "vnni"])
    file = tmp_path / "points.jsonl"
    file.write_text("".join(json.dumps(p) + "\n" for p in [old, avx2, *DENSE]))
    page.write(page.read(file), tmp_path / "tradeoff.md")
    text = (tmp_path / "tradeoff.md").read_text()
    assert "| torch float32 | 91.0 | 35.0 | 700 | 0.650 [0.60, 0.70] | +0.000 [-0.01, +0.01] | 1.0000 |" in text
    assert "999" not in text
    assert text.count("| torch float32 |") == 2
    assert "scripts/hide avx512 vnni -- scripts/tradeoff.py measure" in text
    for stem in ("tradeoff-some-1-2-avx512-vnni", "tradeoff-some-1-2-avx2"):
        assert f"]({stem}.svg)" in text
        assert (tmp_path / f"{stem}.svg").stat().st_size > 1000


def test_the_written_page_is_current():
    if not tradeoff.OUT.exists():
        pytest.skip("no points were recorded")
    written = (tradeoff.RESULTS_FOLDER / "tradeoff.md").read_text()
    assert written == page.page(page.read(tradeoff.OUT)), "run scripts/tradeoff.py report"

"""Benchmarks: every peer computes the same layer, ratios are right, and the page says what was measured."""

import copy
import json

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is missing: pip install 'sparsify-torch[hf]'")

import bench as script
from benchmarks import bars, gpu, kernels, layers, load, models, page, peers, record, tables, weights
from benchmarks.cases import GRIDS, Grid
from tested_kernels import needs_native
from torch import nn

from sparsify.cli import main
from sparsify.cli.model_inputs import check_inputs, make_inputs
from sparsify.hardware.timing import LoadMeter, Timing, disturbance, measure
from sparsify.kernels.cpu import library as native
from sparsify.reporting.model_bench import bench, typical_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- peers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*peers.DENSE, *peers.SPARSE])
@pytest.mark.parametrize(("out", "in_", "tokens"), [(96, 64, 1), (96, 64, 5), (33, 17, 3), (1, 1, 1)])
def test_a_peer_computes_the_layer(name, out, in_, tokens):
    if name in peers.absent():
        pytest.skip(f"{name}: {peers.absent()[name]}")
    torch.manual_seed(0)
    weight = torch.randn(out, in_) * (torch.rand(out, in_) < 0.5)
    bias, x = torch.randn(out), torch.randn(tokens, in_)
    right = x.double() @ weight.double().t() + bias.double()
    with torch.inference_mode():
        call = (peers.DENSE | peers.SPARSE)[name](weight, bias, x)
        for _ in range(2):
            answer = torch.as_tensor(call())
            assert answer.shape == (tokens, out)
            peers.check(name, answer, right)


@pytest.mark.parametrize("wrong", [torch.nan, 1.001])
def test_a_wrong_answer_stops_the_benchmark(wrong):
    right = torch.ones(2, 3, dtype=torch.float64)
    answer = right.clone()
    answer[1, 2] = wrong
    with pytest.raises(RuntimeError, match="openvino: the answer is off"):
        peers.check("openvino", answer, right)


def test_absent_peers_are_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda package: None)
    assert peers.absent()["onnxruntime"] == ("onnxruntime and onnx not installed; pip install 'sparsify-torch[bench]'")
    assert "openvino" not in peers.dense_peers()


# ---- timing ---------------------------------------------------------------------------------------------------------


def test_candidates_are_called_in_turns_and_copies_in_rotation():
    called = []
    calls = {"a": [lambda: called.append("a")], "b": [lambda: called.append("b0"), lambda: called.append("b1")]}
    times = measure(calls, rounds=3, sample_s=1e-5)
    assert {name: timing.n for name, timing in times.items()} == {"a": 3, "b": 3}
    bs = [c for c in called if c != "a"]
    assert bs == ["b0", "b1"] * (len(bs) // 2) + ["b0"] * (len(bs) % 2)
    turns = [c[0] for i, c in enumerate(called) if i == 0 or called[i - 1][0] != c[0]]
    assert 4 <= len(turns) <= 6  # three rounds of two; neighbours may be of one kind


def test_a_timing_is_the_median_between_quartiles():
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(3.0, 2.0, 4.0, 5)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_a_disturbed_machine_is_called_so():
    assert LoadMeter().others_cores() >= 0
    assert disturbance(0.1) == "other processes kept 0.1 cores busy meanwhile"
    assert disturbance(0.2).startswith("NOT TO BE RELIED ON")


# ---- the benchmarks, tiny -------------------------------------------------------------------------------------------


def run_record(name, rows, roofs=()):
    result = record.describe(name, [name, "--quick"])
    result["machine"]["others_cores"] = 0.0
    return result | {"rows": list(rows), "roofs": dict(roofs)}


@needs_native
def test_layers_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "llc_bytes", lambda: 1 << 15)
    result = run_record("layers", layers.run(Grid(((96, 64),), (1, 5), (0.5, 0.9), large=((128, 128),), rounds=1)))
    rows = result["rows"]
    n_dense, n_sparse = len(peers.dense_peers()), len(peers.SPARSE)
    assert len(rows) == 3 * (n_dense + 2 * (n_sparse + 1))
    for row in rows:
        assert set(row) == {
            *("candidate", "sparsity", "form", "copies", "error", "shape", "tokens", "group"),
            *record.TIMES,
        }
        assert row["low_us"] <= row["median_us"] <= row["high_us"]
        assert row["median_us"] > 0
        assert (row["group"] == layers.CACHED) == (row["copies"] == 1)
    ours = [r for r in rows if r["candidate"] == layers.OURS]
    assert {r["form"] for r in ours} <= {"dense", *native.FORMS}
    file = tmp_path / "layers.json"
    record.write(result, file)
    assert record.read(file) == result
    assert "96x64: median microseconds" in tables.tables(result)


@needs_native
def test_kernels_end_to_end(monkeypatch):
    monkeypatch.setattr(weights, "llc_bytes", lambda: 1 << 20)
    grid = Grid(((96, 64),), (128,), (0.5, 0.9), large=((512, 512),), rounds=1)
    roofs = kernels.measure_roofs()
    assert roofs["fma_gflops"] > 1
    assert roofs["read_gbs"] > 0.1
    result = run_record("kernels", kernels.run(grid), roofs)
    assert len(result["rows"]) == 2 * 2 * len(native.FORMS)
    many, one = tables.tables(result).values()
    assert len(many) == 1 + 2
    assert len(one) == 1 + 2 * len(native.FORMS)


@needs_native
def test_load_end_to_end(monkeypatch):
    monkeypatch.setattr(load, "N_CALLS", 50)
    result = run_record("load", load.run(Grid(((96, 64),), (1,), (0.9,))))
    assert [r["busy"] for r in result["rows"]] == [False, False, True, True]
    assert all(r["p99_us"] >= r["median_us"] for r in result["rows"])
    assert len(next(iter(tables.tables(result).values()))) == 3


@needs_native
def test_models_end_to_end(monkeypatch):
    tiny = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 64)).eval()
    monkeypatch.setattr(models, "_build", lambda name: tiny)
    result = run_record("models", models.bench_models({"vit_b_16": (1, 2)}, (0.5, 0.9), rounds=1))
    n_dense = 2 + ("torch int8" not in peers.absent())
    assert [(r["batch"], r["tokens"]) for r in result["rows"]] == [(1, 1)] * (n_dense + 2) + [(2, 2)] * (n_dense + 2)
    assert all(sum(r["forms"].values()) == 1 for r in result["rows"] if r["candidate"] == layers.OURS)
    (table,) = tables.tables(result).values()
    assert table[1][2:5] == ["torch fp32", table[1][3], "1.00x"]
    assert f"({bars.MODEL_BARS['vit_b_16', 0.9]:g})" in table[n_dense + 2][4]


def test_every_grid_is_more_than_its_quick_one():
    for full, quick in GRIDS.values():
        assert set(quick.shapes) <= set(full.shapes)
        assert set(quick.tokens) <= set(full.tokens)
        assert quick.rounds <= full.rounds


# ---- ratios and the page --------------------------------------------------------------------------------------------


def row(candidate, tokens, median_us, sparsity=None, group=layers.CACHED, form=""):
    times = {"median_us": median_us, "low_us": 0.9 * median_us, "high_us": 1.1 * median_us, "n": 11}
    facts = {"sparsity": sparsity, "form": form, "copies": 1, "error": 0.0}
    return {"candidate": candidate, "shape": [768, 768], "tokens": tokens, "group": group, **facts, **times}


STORED = [
    row("torch fp32", 16, 90.0),
    row("onnxruntime", 16, 40.0),
    row("openvino", 16, 45.0),
    row("sparsify", 16, 10.0, 0.5, form="panel"),
    row("sparsify", 16, 8.0, 0.9, form="panel"),
    row("torch fp32", 32, 90.0),
    row("onnxruntime", 32, 50.0),
    row("openvino", 32, 25.0),
    row("sparsify", 32, 25.0 / 0.9, 0.5, form="dense"),
    row("sparsify", 32, 5.0, 0.9, form="panel"),
]


def test_geometric_mean():
    assert bars.geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert bars.geometric_mean([3.0]) == pytest.approx(3.0)


def test_ratios_take_the_fastest_opponent_of_each_cell():
    best = bars.Bar(layers.CACHED, (16, 512), "best dense fp32")
    assert [r.times for r in bars.ratios(STORED, best, 0.5)] == [pytest.approx(4.0), pytest.approx(0.9)]
    assert bars.ratios(STORED, bars.Bar(layers.CACHED, (1, 8), "best dense fp32"), 0.5) == []
    without_engines = [r for r in STORED if r["candidate"] not in peers.ENGINES]
    assert bars.ratios(without_engines, best, 0.5) == []


def test_bars_are_those_of_the_plan():
    assert all(bar.against in bars.OPPONENTS for bar in bars.LAYER_BARS)
    assert sum(bool(bar.needs) for bar in bars.LAYER_BARS) == 5


def test_the_page_from_a_stored_file(tmp_path):
    pytest.importorskip("matplotlib")
    result = run_record("layers", STORED)
    result["machine"] |= {"name": "some machine", "others_cores": 1.2}
    result["absent"] = {"openvino": "not installed"}
    stored, out = tmp_path / "layers.json", tmp_path / "speed.md"
    record.write(result, stored)
    assert script.main(["report", str(stored), "--out", str(out)]) == 0
    text = out.read_text()
    # geometric means of 4 and 0.9, of 5 and 5
    assert "| 16 to 512 tokens | best dense fp32 | 1.90x (1.2) | 5.00x (3.8) |" in text
    assert "| 16 to 512 tokens | torch fp32 | 5.40x (2.5) | 14.23x (9) |" in text
    assert "slower than best dense fp32 in 1 of 2 cells, worst 0.90x at 768x768, 32 tokens" in text
    assert "Not measured: openvino (not installed)." in text
    assert "scripts/bench.py layers --quick" in text
    assert "±10.0%" in text
    assert "some machine" in text
    assert "NOT TO BE RELIED ON: other processes kept 1.2 cores busy" in text
    assert "| 32 | 90 | 50 | 25 |" in text
    picture = (tmp_path / "speed.svg").read_text()
    assert "best dense fp32" in picture
    assert len(picture) < 100_000


def test_what_falls_short_gets_a_star():
    worse = copy.deepcopy(STORED)
    for r in worse:
        r["median_us"] *= 5 if r["candidate"] == "sparsify" else 1
    text = page.page([run_record("layers", worse)])
    assert "0.38x (1.2) \\*" in text


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 2, "rows": []}'])
def test_a_file_that_is_no_result_is_refused(tmp_path, text, capsys):
    file = tmp_path / "other.json"
    file.write_text(text)
    assert script.main(["report", str(file), "--out", str(tmp_path / "x.md")]) == 2
    assert str(file) in capsys.readouterr().err
    assert not (tmp_path / "x.md").exists()


# ---- sparsify bench -------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two Linears of different work, on 4 rows per input for the second."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.unused = nn.Linear(64, 96), nn.Linear(24, 8), nn.Linear(4, 4)

    def forward(self, x):
        return self.narrow(self.wide(x).reshape(-1, 4, 24))


def small():
    torch.manual_seed(0)
    return Small().eval()


def small_inputs():
    return {"x": torch.randn(2, 64)}


def test_bench_compares_a_model_with_its_sparse_copy():
    model = small()
    before = copy.deepcopy(model.state_dict())
    result = bench(model, (torch.randn(6, 64),), 0.9, rounds=3)
    assert result.tokens == 6
    assert {x.name: x.tokens for x in result.layers} == {"wide": 6, "narrow": 24, "unused": None}
    assert [x.dense_us is None for x in result.layers] == [False, False, True]
    assert f"{result.speedup:.2f}x dense at sparsity 0.9" in str(result)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_typical_tokens_are_those_of_most_of_the_work():
    assert typical_tokens(small(), (torch.randn(3, 64),)) == 3
    with pytest.raises(ValueError, match="none of its Linears"):
        typical_tokens(nn.ReLU(), (torch.randn(3),))


def test_bench_command(capsys):
    spec = f"{__name__}:small"
    assert main(["bench", "--model", spec, "--shape", "64", "--batch", "5", "--json", "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 5
    assert result["dense"]["median_s"] / result["sparse"]["median_s"] == pytest.approx(result["speedup"])
    assert main(["bench", "--model", spec, "--inputs", f"{__name__}:small_inputs", "--sparsity", "0.5"]) == 0
    assert "x dense at sparsity 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "cannot be guessed; give --shape"),
        (("--shape", "3"), "does not run on inputs of 1x3"),
        (("--seq", "3"), "has no nn.Embedding"),
        (("--seq", "3", "--shape", "64"), "give one of them"),
        (("--shape", "64", "--batch", "0"), "must be positive"),
        (("--shape", "64", "--sparsity", "1.5"), "between 0 and 1"),
        (("--shape", "64", "--threads", "0"), "at least 1"),
        (("--inputs", "nowhere:f"), "write package.module:function"),
        (("--inputs", f"{__name__}:small_inputs", "--batch", "2"), "no effect beside --inputs"),
    ],
)
def test_bench_command_says_what_is_wrong(options, message, capsys):
    assert main(["bench", "--model", f"{__name__}:small", *options]) == 2
    assert message in capsys.readouterr().err


def test_inputs_are_guessed_from_the_kind_of_model():
    images = make_inputs(nn.Identity(), "torchvision:any", batch=2)
    assert images[0].shape == (2, 3, 224, 224)
    text = nn.Sequential(nn.Embedding(50, 8), nn.Embedding(7, 8))
    ids = make_inputs(text, "hf:folder", batch=2)["input_ids"]
    assert ids.shape == (2, 128)
    assert int(ids.max()) < 7
    check_inputs(nn.Embedding(9, 2), "my:model", make_inputs(nn.Embedding(9, 2), "my:model", seq=4))


@needs_native
def test_the_gpu_benchmark_end_to_end_on_the_forms_of_the_cpu(monkeypatch):
    """The GPU has stand-ins; the flow, the check of answers and the table are the real ones."""
    monkeypatch.setattr(gpu.gpu_timing, "n_copies", lambda *_: 2)
    monkeypatch.setattr(gpu.gpu_timing, "measure_replays", lambda calls, _, rounds: measure(calls, rounds=rounds))
    grid = Grid(((128, 128),), (1, 5), (0.5, 0.75), rounds=1)
    rows = list(gpu.run(grid, torch.float32, torch.device("cpu")))
    assert len(rows) == 7 * 2 * (1 + len(native.FORMS))
    assert {row["pattern"] for row in rows} == set(gpu.PATTERNS)
    assert all(row["copies"] == 2 and row["bytes_of_dense"] > 0 for row in rows)
    result = run_record("gpu", rows, {"copy_gbs": 100.0})
    (table,) = tables.tables(result).values()
    assert len(table) == 1 + len(rows)
    monkeypatch.setattr(gpu, "_sparse", lambda x, *_: lambda: x.new_zeros(len(x), 128))
    with pytest.raises(RuntimeError, match="off by"):
        list(gpu.run(grid, torch.float32, torch.device("cpu")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(capsys):
    assert script.main(["gpu", "--quick"]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err

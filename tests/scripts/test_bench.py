"""Benchmarks: every peer computes the same layer, ratios are right, and the page says what was measured."""

import copy

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is missing: pip install 'sparsify-torch[hf]'")

import bench as script
from benchmarks import (
    bars,
    gpu,
    isa,
    kernels,
    layers,
    models,
    page,
    peers,
    record,
    tables,
    weights,
)
from benchmarks.cases import GRIDS, Grid
from tested_kernels import needs_native
from torch import nn

from sparsify.hardware.timing import LoadMeter, Timing, disturbance, measure
from sparsify.kernels.cpu import library as native
from sparsify.reporting.dense_engines import Engine

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- peers ----------------------------------------------------------------------------------------------------------


PEERS = [(name, variant) for name, variants in peers.DENSE.items() for variant in variants]
PEERS += [(name, "") for name in peers.SPARSE]


@pytest.mark.parametrize(("name", "variant"), PEERS)
@pytest.mark.parametrize(("out", "in_", "tokens"), [(96, 64, 1), (96, 64, 5), (33, 17, 3), (1, 1, 1)])
def test_a_peer_computes_the_layer(name, variant, out, in_, tokens):
    if name in peers.absent():
        pytest.skip(f"{name}: {peers.absent()[name]}")
    torch.manual_seed(0)
    weight = torch.randn(out, in_) * (torch.rand(out, in_) < 0.5)
    bias, x = torch.randn(out), torch.randn(tokens, in_)
    right = x.double() @ weight.double().t() + bias.double()
    with torch.inference_mode():
        make = peers.SPARSE[name] if name in peers.SPARSE else peers.DENSE[name][variant]
        call = make(weight, bias, x)
        for _ in range(2):
            answer = torch.as_tensor(call())
            assert answer.shape == (tokens, out)
            if variant in SATURATING and not any("vnni" in flag for flag in isa.visible()):
                assert peers.error(answer, right) < 0.5
            else:
                peers.check(name, answer, right)


#: Variants with sums of products of 8 bits, which saturate without VNNI.
SATURATING = ("dynamic", "static")


def test_the_fastest_variant_is_one_with_an_acceptable_error(monkeypatch):
    def variant(times, error):
        def make(weight, bias, x):
            y = torch.nn.functional.linear(x, weight, bias)
            y = y + error * y.abs().max()
            return lambda: sum([y] * times) / times

        return make

    variants = {"slow": variant(500, 0.01), "wrong": variant(1, 0.2), "fast": variant(1, 0.01)}
    monkeypatch.setitem(peers.DENSE, "openvino int8", variants)
    tensors = torch.eye(3), torch.zeros(3), torch.randn(2, 3)
    assert peers.fastest("openvino int8", *tensors) == ("fast", variants["fast"])
    del variants["slow"], variants["fast"]
    variants["also wrong"] = variant(1, 0.3)
    with pytest.raises(RuntimeError, match=r"every variant is off by more than 0\.04"):
        peers.fastest("openvino int8", *tensors)


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
    monkeypatch.setattr(weights, "last_level_cache_bytes", lambda: 1 << 15)
    grid = Grid(((96, 64),), (1, 5), (0.5, 0.9), (0.75,), large=((128, 128),), rounds=1)
    result = run_record("layers", layers.run(grid))
    rows = result["rows"]
    n_compiled = len(set(peers.COMPILED) & set(peers.dense_peers()))
    n_ours = sum(1 if kind.pattern == "1x4" else 2 for kind in layers.KINDS.values())
    assert len(rows) == 3 * (len(peers.dense_peers()) + 2 * len(peers.SPARSE) + n_ours) - n_compiled
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
    assert "96x64, median microseconds" in tables.tables(result)
    assert "96x64, int8 and bfloat16, median microseconds" in tables.tables(result)


@needs_native
def test_kernels_end_to_end(monkeypatch):
    monkeypatch.setattr(weights, "last_level_cache_bytes", lambda: 1 << 20)
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
def test_models_end_to_end(monkeypatch):
    tiny = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 64)).eval()
    monkeypatch.setattr(models, "_build", lambda name: tiny)
    engines = [Engine("torch int8", lambda: torch.zeros(1), 0.01, 9), Engine("OpenVINO int8", why="not installed")]
    monkeypatch.setattr(models, "dense_engines", lambda *_: engines)
    result = run_record("models", models.bench_models({"vit_b_16": (1, 2)}, (0.5, 0.9), rounds=1))
    result["machine"]["isa"] = "avx512-vnni"
    assert [r["candidate"] for r in result["rows"]] == 2 * [
        "torch fp32",
        "torch bf16",
        "torch int8",
        *2 * [layers.OURS],
        *2 * [layers.INT8],
    ]
    assert [(r["batch"], r["tokens"]) for r in result["rows"]] == [(1, 1)] * 7 + [(2, 2)] * 7
    assert all(sum(r["forms"].values()) == 1 for r in result["rows"] if r["candidate"] == layers.OURS)
    (table,) = tables.tables(result).values()
    assert table[0][4:] == ["times torch fp32 (bar)", "times best dense int8 (bar)", "layers by form"]
    assert table[1][2:5] == ["torch fp32", table[1][3], "1.00x"]
    assert table[3][2:6] == ["torch int8", table[3][3], table[3][4], "1.00x"]
    assert f"({bars.MODEL_BARS['avx512']['vit_b_16', 'sparsify', 0.9]:g})" in table[5][4]


@pytest.mark.parametrize(("kernel", "flags", "known"), [
    ("avx512amx", ["amx_int8"], "avx512-amx"),
    ("avx512vnni", ["avx512_vnni"], "avx512-vnni"),
    ("avx512", [], "avx512"),
    ("avxvnni", ["avx_vnni"], "avx2"),
    ("avx2", [], "avx2"),
])  # fmt: skip
def test_bars_are_found_for_every_instruction_set_of_the_kernels(kernel, flags, known):
    found = bars.plain_isa(isa.name(kernel, flags))
    assert found == known
    assert found.partition("-")[0] in bars.CONVOLUTION_BARS
    assert found in bars.BEST_MODEL_BARS or found == "avx512"


def test_copies_exceed_the_cache_and_fit_in_memory(monkeypatch):
    monkeypatch.setattr(weights, "last_level_cache_bytes", lambda: 32 << 20)
    assert weights.n_copies(64 << 20) == 2
    monkeypatch.setattr(weights, "last_level_cache_bytes", lambda: 300 << 20)
    assert weights.n_copies(64 << 20) == 8


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


@pytest.mark.parametrize(("name", "n_claims"), [("avx512", 5), ("avx512-vnni", 10), ("avx512-amx", 5), ("avx2", 9)])
def test_bars_are_those_of_the_instruction_set(name, n_claims):
    chosen = bars.layer_bars(name)
    assert sum(bool(bar.needs) for bar in chosen) == n_claims
    assert all(bar.against in bars.OPPONENTS for bar in chosen)
    assert len({(bar.group, bar.tokens, bar.against, bar.ours) for bar in chosen}) == len(chosen)


def test_int8_is_compared_with_the_fastest_int8_and_with_our_float32():
    rows = [row("torch int8", 16, 9.0), row("openvino int8", 16, 6.0), row("sparsify", 16, 4.0, 0.5)]
    rows += [row("sparsify int8", 16, 2.0, 0.5), row("sparsify int8", 16, 1.0, 0.9)]
    many = bars.Bar(layers.CACHED, bars.MANY, "best dense int8", ours=layers.INT8)
    assert [[r.times for r in bars.ratios(rows, many, s)] for s in (0.5, 0.9)] == [[3.0], [6.0]]
    ours = bars.Bar(layers.CACHED, bars.MANY, layers.OURS, ours=layers.INT8)
    assert [[r.times for r in bars.ratios(rows, ours, s)] for s in (0.5, 0.9)] == [[2.0], []]


def stored_record(**machine):
    result = run_record("layers", STORED)
    facts = {"processor": "Some CPU (x86_64 1/2)", "kernel": "avx512", "isa": "avx512", "hidden": []}
    result["machine"] |= {"name": "some machine", "others_cores": 1.2} | facts | machine
    return result | {"absent": {"openvino": "not installed"}}


def test_the_page_from_stored_files(tmp_path):
    pytest.importorskip("matplotlib")
    fast, slow = stored_record(), stored_record(isa="avx2", hidden=["avx512", "vnni"])
    slow["rows"] = [r | {"median_us": r["median_us"] * (2 if r["candidate"] == "sparsify" else 1)} for r in STORED]
    out = tmp_path / "speed.md"
    for number, result in enumerate((fast, slow)):
        record.write(result, tmp_path / f"{number}.json")
    assert script.main(["report", *(str(tmp_path / f"{n}.json") for n in (0, 1)), "--out", str(out)]) == 0
    text = out.read_text()
    # geometric means of 4 and 0.9, of 5 and 5; a run with another instruction set stays apart
    assert "| sparsify | 16 to 512 tokens | best dense fp32 | 1.90x (1.2) | 5.00x (3.8) |" in text
    assert "| sparsify | 16 to 512 tokens | best dense fp32 | 0.95x (1.3) \\* | 2.50x (4.2) \\* |" in text
    assert "| sparsify | 16 to 512 tokens | torch fp32 | 5.40x (2.5) | 14.23x (9) |" in text
    assert "slower than best dense fp32 in 1 of 2 cells, worst 0.90x at 768x768, 32 tokens" in text
    assert "## Layers, everything included: Some CPU (x86_64 1/2), avx512\n" in text
    assert "## Layers, everything included: Some CPU (x86_64 1/2), avx2\n" in text
    assert "hidden from all of them: avx512, vnni." in " ".join(text.split())
    assert "Not measured: openvino (not installed)." in text
    assert "scripts/bench.py layers --quick" in text
    assert "±10.0%" in text
    assert "NOT TO BE RELIED ON: other processes kept 1.2 cores busy" in text
    assert "| 32 | 90 | 50 | 25 |" in text
    for stem in ("layers-some-1-2-avx512", "layers-some-1-2-avx2"):
        assert f"]({stem}.svg)" in text
        picture = (tmp_path / f"{stem}.svg").read_text()
        assert "best dense fp32" in picture
        assert len(picture) < 100_000


def test_two_runs_of_one_processor_and_instruction_set_are_refused(tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        record.write(stored_record(), file)
    assert script.main(["report", *map(str, files), "--out", str(tmp_path / "x.md")]) == 2
    assert "b.json: a second run of layers-some-1-2-avx512" in capsys.readouterr().err


def test_the_file_of_a_run_is_named_after_processor_and_instruction_set():
    result = stored_record(processor="Intel(R) Xeon(R) Processor (x86_64 6/207)", isa="avx512-amx")
    assert record.file_name(result) == "layers-intel-xeon-6-207-avx512-amx.json"
    gpu_run = stored_record(name="NVIDIA H100 80GB HBM3") | {"benchmark": "gpu"}
    assert record.file_name(gpu_run) == "gpu-nvidia-h100-80gb-hbm3.json"


def test_peers_with_more_instructions_than_our_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(isa, "visible", lambda: ["avx2", "avx512f"])
    monkeypatch.setattr(isa, "kernel", lambda: "avx2")
    assert script.main(["layers", "--quick"]) == 2
    assert "scripts/hide avx512 vnni -- scripts/bench.py" in capsys.readouterr().err


def test_hidden_features_are_in_the_command_and_not_visible(monkeypatch):
    monkeypatch.setenv("SPARSIFY_HIDDEN", "avx512 vnni")
    monkeypatch.delenv("SPARSIFY_KERNEL", raising=False)
    assert record.describe("layers", ["layers"])["command"] == "scripts/hide avx512 vnni -- scripts/bench.py layers"
    assert not {"avx512f", "amx_int8", "avx_vnni", "avx512_vnni"} & set(isa.visible())


def test_the_page_of_speed_is_current():
    files = sorted(script.RESULTS_FOLDER.glob("*.json"))
    records = {file.stem: record.read(file) for file in files}
    assert {file.stem for file in files} == {record.file_name(r).removesuffix(".json") for r in records.values()}
    assert (script.RESULTS_FOLDER / "speed.md").read_text() == page.page(records), "run scripts/bench.py report"


def test_what_falls_short_gets_a_star():
    worse = copy.deepcopy(STORED)
    for r in worse:
        r["median_us"] *= 5 if r["candidate"] == "sparsify" else 1
    text = page.page({"worse": stored_record() | {"rows": worse}})
    assert "0.38x (1.2) \\*" in text


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 2, "rows": []}'])
def test_a_file_that_is_no_result_is_refused(tmp_path, text, capsys):
    file = tmp_path / "other.json"
    file.write_text(text)
    assert script.main(["report", str(file), "--out", str(tmp_path / "x.md")]) == 2
    assert str(file) in capsys.readouterr().err
    assert not (tmp_path / "x.md").exists()


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

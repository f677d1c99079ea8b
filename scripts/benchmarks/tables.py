"""The tables of each benchmark, as rows of cells: for the terminal and for docs/results/speed.md alike."""

from collections.abc import Sequence
from typing import Any

from benchmarks.bars import (
    BEST_MODEL_BARS,
    CONVOLUTION_BARS,
    DEPLOYED_BAR,
    KERNEL_BARS,
    LOAD_BAR,
    MODEL_BARS,
    OPPONENTS,
    TEAM_BAR,
    Row,
    against_bar,
    best_by,
    geometric_mean,
    layer_bars,
    plain_isa,
    ratios,
)
from benchmarks.layers import BEYOND_CACHE, BF16, CACHED, INT8, INT8_BLOCKS, OURS
from benchmarks.peers import DENSE, SPARSE

SMALL = (INT8, INT8_BLOCKS, BF16)
LARGE, SMALL_PEERS = ("torch fp32", "onnxruntime", "openvino"), OPPONENTS["best dense int8"] + ("torch bf16",)

Record = dict[str, Any]
Table = list[list[str]]


def tables(record: Record) -> dict[str, Table]:
    """Return the tables of a record, title -> rows; the first row is the head."""
    by_benchmark = {
        "kernels": _kernels,
        "layers": _layers,
        "convolutions": _convolutions,
        "gpu": _gpu,
        "models": _models,
        "load": _load,
        "teams": _teams,
        "deployed": _deployed,
    }
    return by_benchmark[record["benchmark"]](record)


def spread(record: Record) -> str:
    """Return the spread of the samples: half the distance of the quartiles, as a share of the median."""
    shares = sorted((r["high_us"] - r["low_us"]) / 2 / r["median_us"] for r in record["rows"])
    middle, worst = shares[len(shares) // 2], shares[-1]
    return f"half of a candidate's samples lie within ±{middle:.1%} of its median (worst: ±{worst:.1%})"


def losses(record: Record) -> list[str]:
    """List, per opponent and sparsity, the cells with a sparse layer slower than a dense one."""
    lines = []
    for bar in layer_bars(record["machine"]["isa"]):
        if bar.against == "torch fp32":
            continue
        for sparsity in sparsities(record["rows"]):
            cells = ratios(record["rows"], bar, sparsity)
            lost = sorted((r for r in cells if r.times < 1), key=lambda r: r.times)
            if lost:
                lines.append(
                    f"{bar.ours}, {bar.where}, {sparsity:.0%}: slower than {bar.against} in {len(lost)} of "
                    f"{len(cells)} cells, worst {lost[0]}"
                )
    return lines


def sparsities(rows: Sequence[Row]) -> list[float]:
    """Return the sparsities measured, rising."""
    return sorted({row["sparsity"] for row in rows if row["sparsity"] is not None})


def _layers(record: Record) -> dict[str, Table]:
    rows = record["rows"]
    percent = [f"{s:.0%}" for s in sparsities(rows)]
    summary = [["layer", "cells", "against", *percent]]
    for bar in layer_bars(record["machine"]["isa"]):
        cells = [ratios(rows, bar, s) for s in sparsities(rows)]
        if not any(cells):
            continue
        means = [
            against_bar(geometric_mean([r.times for r in c]), bar.needs.get(s)) if c else "-"
            for c, s in zip(cells, sparsities(rows), strict=True)
        ]
        summary.append([bar.ours, bar.where, bar.against, *means])
    result = {"Times as fast as (bar), geometric means; * falls short": summary}
    small = [name for name in SMALL if any(r["candidate"] == name for r in rows)]
    parts = {"": (LARGE, (*SPARSE, OURS)), " int8 and bfloat16,": (SMALL_PEERS, small)}
    if not small:
        parts = {"": (tuple(DENSE), (*SPARSE, OURS))}
    for group, note in ((CACHED, ""), (BEYOND_CACHE, ", in rotation, more than the last-level cache holds")):
        for shape in dict.fromkeys(tuple(r["shape"]) for r in rows if r["group"] == group):
            own = [r for r in rows if r["group"] == group and tuple(r["shape"]) == shape]
            for part, (dense, sparse) in parts.items():
                title = f"{shape[0]}x{shape[1]}{note},{part} median microseconds"
                result[title] = _times(own, dense, sparse)
    return result


def _times(rows: Sequence[Row], dense: Sequence[str], sparse: Sequence[str]) -> Table:
    columns: list[tuple[str, float | None]] = [(name, None) for name in dense if _of(rows, name)]
    for name in sparse:
        found = sparsities(_of(rows, name))
        columns += [(name, s) for s in (found[:1] + found[-1:] if name in SPARSE else found)]
    head = ["tokens", *(name if s is None else f"{name} {s:.0%}" for name, s in columns)]
    lines = [head]
    for tokens in dict.fromkeys(r["tokens"] for r in rows):
        cells = {(r["candidate"], r["sparsity"]): r for r in rows if r["tokens"] == tokens}
        lines.append([str(tokens), *(_time(cells.get(column)) for column in columns)])
    return lines


def _of(rows: Sequence[Row], candidate: str) -> list[Row]:
    return [row for row in rows if row["candidate"] == candidate]


def _time(row: Row | None) -> str:
    if row is None:
        return "-"
    time = f"{row['median_us']:.0f}" if row["median_us"] >= 100 else f"{row['median_us']:.3g}"
    return f"{time} {row['form']}" if row.get("form") else time


def _convolutions(record: Record) -> dict[str, Table]:
    rows = record["rows"]
    names = list(dict.fromkeys(r["candidate"] for r in rows if r["sparsity"] is None))
    lines = [["channels, map, images", *(f"{name} us" for name in names), "layout", *_percents(rows)]]
    bars = CONVOLUTION_BARS.get(_isa_kernels(record), {})
    means: dict[float, list[float]] = {}
    for where in dict.fromkeys((r["channels"], r["size"], r["images"]) for r in rows):
        cells = [r for r in rows if (r["channels"], r["size"], r["images"]) == where]
        dense = {r["candidate"]: r["median_us"] for r in cells if r["sparsity"] is None}
        best: dict[float, float] = {}
        for layout in dict.fromkeys(r["candidate"] for r in cells if r["sparsity"] is not None):
            ours = {r["sparsity"]: r for r in cells if r["candidate"] == layout}
            times = {s: min(dense.values()) / r["median_us"] for s, r in ours.items()}
            best = {s: max(t, best.get(s, 0.0)) for s, t in times.items()}
            texts = [f"{t:.2f}x" + (" dense" if ours[s]["form"] == "dense" else "") for s, t in sorted(times.items())]
            place = f"{where[0]}, {where[1]}x{where[1]}, {where[2]}"
            lines.append([place, *(f"{dense[name]:.0f}" for name in names), layout.split()[-1], *texts])
        for sparsity, factor in best.items():
            means.setdefault(sparsity, []).append(factor)
    totals = [against_bar(geometric_mean(factors), bars.get(s)) for s, factors in sorted(means.items())]
    lines.append(["geometric mean of the better layout (bar)", *[""] * len(names), "", *totals])
    return {"3x3 convolutions, times as fast as the best dense one; * falls short": lines}


def _percents(rows: Sequence[Row]) -> list[str]:
    return [f"{s:.0%}" for s in sparsities(rows)]


def _kernels(record: Record) -> dict[str, Table]:
    rows, (peak, bandwidth) = record["rows"], (record["roofs"]["fma_gflops"], record["roofs"]["read_gbs"])
    bars = KERNEL_BARS.get(_isa_kernels(record), {})
    bests = "best_us" in rows[0]
    shares = ["share of the peak", "at best (bar)"] if bests else ["share of the peak (bar)"]
    many = [["weight", "tokens", "sparsity", "form", "us", "useful GFLOP/s", *shares]]
    for r in best_by((r for r in rows if r["tokens"] > 1), "shape", "tokens", "sparsity", largest="gflops"):
        middle = r["gflops"] / r.get("peak_gflops", peak)
        best = r["gflops"] * r["median_us"] / r["best_us"] / r["best_peak_gflops"] if bests else middle
        texts = [f"{middle:.2f}"] * bests
        texts.append(against_bar(best, bars.get(r["sparsity"])).replace("x", "", 1))
        many.append([*_where(r), r["candidate"], _time(r), f"{r['gflops']:.0f}", *texts])
    one = [["weight", "tokens", "sparsity", "form", "us", "GB/s of packed weight", "of the bandwidth"]]
    for r in (r for r in rows if r["tokens"] == 1):
        one.append([*_where(r), r["candidate"], _time(r), f"{r['gbs']:.1f}", f"{r['gbs'] / bandwidth:.2f}"])
    peak_of = "the peak is timed in the same rounds" if "peak_gflops" in rows[0] else f"the peak is {peak:.0f} GFLOP/s"
    result = {f"Fastest form; multiply-adds: {peak_of}": many}
    if len(one) > 1:
        result[f"One token, weights from memory, which gives {bandwidth:.0f} GB/s"] = one
    return result


def _gpu(record: Record) -> dict[str, Table]:
    bandwidth = record["roofs"]["copy_gbs"]
    head = ["weight", "tokens", "pattern", "sparsity", "form", "us", "x cuBLAS", "bytes of dense", "of the bandwidth"]
    lines = [head]
    dense: Row = {}
    for r in record["rows"]:
        dense = r if r["candidate"] == "cuBLAS" else dense  # the first of its cell
        where = ["x".join(map(str, r["shape"])), str(r["tokens"]), r["pattern"], f"{r['sparsity']:.0%}"]
        times, share = f"{dense['median_us'] / r['median_us']:.2f}", f"{r['gbs'] / bandwidth:.2f}"
        lines.append([*where, r["candidate"], _time(r), times, f"{r['bytes_of_dense']:.3f}", share])
    return {f"{record['rows'][0]['dtype']}; a large copy moves {bandwidth:.0f} GB/s": lines}


def _isa_kernels(record: Record) -> str:
    """Return the part of an instruction set's name that chooses the bars of float32."""
    return plain_isa(record["machine"]["isa"]).partition("-")[0]


def _where(row: Row) -> list[str]:
    return [f"{row['shape'][0]}x{row['shape'][1]}", str(row["tokens"]), f"{row['sparsity']:.0%}"]


def _models(record: Record) -> dict[str, Table]:
    rows = record["rows"]
    head = ["model", "batch", "candidate", "ms", "times torch fp32 (bar)"]
    several = any(r["candidate"].endswith("float32") for r in rows)  # engines beside torch
    more = {
        **({"32": "times best dense fp32 (bar)"} if several else {}),
        "ONNX Runtime float32": "times ONNX Runtime fp32 (bar)",
        "int8": "times best dense int8 (bar)",
    }
    more = {engine: title for engine, title in more.items() if any(r["candidate"].endswith(engine) for r in rows)}
    lines = [[*head, *more.values(), "layers by form"]]
    bars = MODEL_BARS.get(_isa_kernels(record), {})
    best_bars = BEST_MODEL_BARS.get(plain_isa(record["machine"]["isa"]), {})
    for r in rows:
        dense = [d for d in rows if d["sparsity"] is None and (d["model"], d["batch"]) == (r["model"], r["batch"])]
        name = r["candidate"] if r["sparsity"] is None else f"{r['candidate']} {r['sparsity']:.0%}"
        key = (r["model"], r["candidate"], r["sparsity"])
        cells = [_against(r, dense, "torch fp32", bars.get(key))]
        best_bar = best_bars.get(key, {})
        cells += [_against(r, dense, engine, best_bar.get(engine)) for engine in more]
        forms = ", ".join(f"{n} {form}" for form, n in r.get("forms", {}).items())
        lines.append([r["model"], str(r["batch"]), name, f"{r['median_us'] / 1e3:.1f}", *cells, forms or "-"])
    return {"Whole models; * falls short": lines}


def _against(row: Row, dense: Sequence[Row], ending: str, bar: float | None) -> str:
    """Compare a row with the fastest dense candidate whose name has an ending."""
    times = [d["median_us"] for d in dense if d["candidate"].endswith(ending)]
    return against_bar(min(times) / row["median_us"], bar) if times else "-"


def _load(record: Record) -> dict[str, Table]:
    lines = [
        [
            "weight",
            "tokens",
            "sparsity",
            "layer",
            "median us",
            "p99 us",
            "busy: median us",
            "busy: p99 us",
            "p99 over (bar)",
        ]
    ]
    quiet = {_load_key(r): r for r in record["rows"] if not r["busy"]}
    for r in (r for r in record["rows"] if r["busy"]):
        q = quiet[_load_key(r)]
        ratio = against_bar(r["p99_us"] / q["median_us"], LOAD_BAR if r["candidate"] == OURS else None, at_most=True)
        lines.append(
            [*_where(r), r["candidate"], _time(q), f"{q['p99_us']:.0f}", _time(r), f"{r['p99_us']:.0f}", ratio]
        )
    return {
        "Single calls, alone and beside a process that keeps one core busy; last: busy p99 over quiet median": lines
    }


def _teams(record: Record) -> dict[str, Table]:
    by_key = {(*_load_key(r), r["busy"]): r for r in record["rows"]}
    lines = [
        ["weight", "tokens", "sparsity", "beside", "openmp us", "pool us", "pool over openmp", "p99 openmp", "p99 pool"]
    ]
    ratios_of: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for r in (r for r in record["rows"] if r["candidate"] == "openmp"):
        pool = by_key[(*_where(r), "pool", r["busy"])]
        ratio = pool["median_us"] / r["median_us"]
        ratios_of[r["busy"]].append((ratio, pool["p99_us"] / r["p99_us"]))
        beside = "a busy process" if r["busy"] else "nothing"
        lines.append(
            [*_where(r), beside, _time(r), _time(pool), f"{ratio:.2f}", f"{r['p99_us']:.0f}", f"{pool['p99_us']:.0f}"]
        )
    for busy, found in ratios_of.items():
        mean, tail = (geometric_mean(of_kind) for of_kind in zip(*found, strict=True))
        bars = against_bar(mean, TEAM_BAR, at_most=True), against_bar(tail, 1.0 if busy else None, at_most=True)
        lines.append(["all", "", "", "a busy process" if busy else "nothing", "", "", bars[0], "", bars[1]])
    return {"Single calls on the threads of each team, us; the last lines: geometric means of pool over openmp": lines}


def _deployed(record: Record) -> dict[str, Table]:
    ours = record["rows"][0]
    lines = [["", "ms", "over Python (bar)"]]
    for r in record["rows"]:
        bar = None if r is ours else DEPLOYED_BAR
        lines.append(
            [
                r["candidate"],
                f"{r['median_us'] / 1e3:.2f}",
                against_bar(r["median_us"] / ours["median_us"], bar, at_most=True),
            ]
        )
    return {f"{ours['batch']} text of {ours['tokens']} tokens, {ours['sparsity']:.0%}": lines}


def _load_key(row: Row) -> tuple[str, ...]:
    return (*_where(row), row["candidate"])

"""docs/results/tradeoff.md and its pictures, from the measured points; nothing typed in."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import isa
from prose import filled

from sparsify.hardware.timing import disturbance

Point = dict[str, Any]

_INTRO = """# Pruning against int8

Written by `scripts/tradeoff.py report` from docs/results/tradeoff.jsonl; nothing here is typed in by hand. The sentence
encoder MiniLM-L6, dense in several engines, and pruned and exported by this library: size of the file, latency, and
quality. All points of a table were timed in turns in one process; a time is the median of a batch of texts with 128
tokens each.

- Models are pruned by ALPS with correction on pieces of news and Wikipedia. Those called recovered were then distilled
  for four minutes (`recover`) on all text of both, with masks that move.
- **Lee**: Pearson's r of similarities with human ratings of 50 news documents, others of whose source are in the
  calibration data.
- **Brown**: share of 272 passages of the Brown corpus whose nearest other passage is of the same of 17 files. Nothing
  of the corpus is in the calibration data.
- **change**: the figure less that of torch's float32, with its 95% interval over the same draws of texts (bootstrap).
- **cosine**: mean cosine to the dense embeddings.
- The int8 files of this library, ONNX Runtime and OpenVINO hold the embeddings in int8 as well; torch's does not.
- **.pt2**: the same exported model as a package of AOTInductor for the batch size, called without the Python of
  transformers; the larger of both packages counts as the file.
"""
_COLORS = {
    "dense float32": "#777777",
    "dense int8": "#ee6677",
    "sparsify float32": "#4477aa",
    "sparsify int8": "#228833",
    "sparsify int8 .pt2": "#aa3377",
}


def read(file: Path) -> list[Point]:
    """Read the points; of one measured again on the same processor and instruction set, the last."""
    points = [json.loads(line) for line in file.read_text().splitlines()]
    return list({(p["processor"], p["isa"], p["point"]): p for p in points}.values())


def write(points: Sequence[Point], file: Path) -> None:
    """Write the page, and beside it a picture of each processor and instruction set."""
    for stem, mine in runs(points).items():
        draw(mine, file.with_name(f"{stem}.svg"))
    file.write_text(page(points))


def runs(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Return the points by processor and instruction set, under the stem of their picture."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(f"tradeoff-{isa.slug(point['processor'])}-{point['isa']}", []).append(point)
    return dict(sorted(found.items()))


def page(points: Sequence[Point]) -> str:
    """Lay out the points of each processor and instruction set."""
    parts = [_INTRO]
    for stem, mine in runs(points).items():
        first = mine[0]
        hidden = f" {', '.join(first['hidden'])} hidden from all candidates." if first["hidden"] else ""
        command = " ".join(
            [*(["scripts/hide", *first["hidden"], "--"] if first["hidden"] else ()), "scripts/tradeoff.py"]
        )
        parts += [
            f"## {first['processor']}, {first['isa']}",
            f"    {command} measure\n",
            filled(
                f"{first['date']}. {first['machine']}, torch {first['torch']}.{hidden} "
                f"{disturbance(first['others_cores'])}."
            ),
            "",
            f"![Quality against latency and file size]({stem}.svg)",
            "",
            table(mine),
            "",
            *(filled(f"- {line}") for line in verdicts(mine)),
            "",
        ]
    return "\n".join(parts)


def table(points: Sequence[Point]) -> str:
    """Write the points as a Markdown table."""
    head = ["", "file MB", "ms, 1 text", "ms, 32 texts", "Lee", "change", "cosine", "Brown", "change", "cosine"]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for p in points:
        cells = [p["point"], f"{p['file_bytes'] / 1e6:.1f}", f"{p['ms_1'][0]:.1f}", f"{p['ms_32'][0]:.0f}"]
        for text in ("lee", "brown"):
            cells += [_figure(p[text]), _figure(p[f"{text}_change"], "+"), f"{p[f'{text}_cosine']:.4f}"]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdicts(points: Sequence[Point]) -> list[str]:
    """Say which points are smaller and faster than every dense int8 engine, and whether their quality is as good.

    As good as dense int8: within the interval of the fastest dense int8 engine, on both texts.
    """
    dense = [p for p in points if p["kind"] == "dense int8"]
    if not dense:
        return ["No dense int8 engine was measured."]
    fastest = {batch: min(dense, key=lambda p: p[f"ms_{batch}"][0]) for batch in (1, 32)}
    smallest = min(dense, key=lambda p: p["file_bytes"])
    best = fastest[32]
    lines = [
        f"Fastest dense int8: {fastest[1]['point']} at 1 text ({fastest[1]['ms_1'][0]:.1f} ms), {best['point']} at 32 "
        f"({best['ms_32'][0]:.0f} ms); smallest: {smallest['point']} ({smallest['file_bytes'] / 1e6:.1f} MB)."
    ]
    ours = [p for p in points if p["kind"].startswith("sparsify")]
    faster = {batch: _faster(ours, fastest[batch], smallest, batch) for batch in fastest}
    better = [p for p in faster[1] if p in faster[32]]
    if not better:
        lines.append("No pruned model is smaller and faster than dense int8 at both 1 and 32 texts.")
    for where, mine in (("1 and 32 texts", better), ("1 text alone", faster[1]), ("32 texts alone", faster[32])):
        lines += [
            f"Smaller and faster at {where}: {p['point']}; {_quality(p, best)}."
            for p in mine
            if mine is better or p not in better
        ]
    near = min((p for p in ours if p not in better), key=lambda p: _excess(p, fastest, smallest), default=None)
    if near is not None and not better:
        lines.append(
            f"The nearest, {near['point']}: {near['file_bytes'] / smallest['file_bytes']:.2f} of the smallest file, "
            f"{near['ms_1'][0] / fastest[1]['ms_1'][0]:.2f} of the shortest time at 1 text, "
            f"{near['ms_32'][0] / best['ms_32'][0]:.2f} at 32."
        )
    return lines


def _faster(ours: Sequence[Point], fastest: Point, smallest: Point, batch: int) -> list[Point]:
    """Return those that are smaller than the smallest and faster at a batch size than the fastest."""
    ms = f"ms_{batch}"
    return [p for p in ours if p["file_bytes"] < smallest["file_bytes"] and p[ms][0] < fastest[ms][0]]


def _quality(point: Point, dense: Point) -> str:
    """Compare a point's quality with the interval of dense int8 on both texts."""
    misses = [
        f"{text.capitalize()} {point[text][0]:.3f} below {dense[text][1]:.3f}"
        for text in ("lee", "brown")
        if point[text][0] < dense[text][1]
    ]
    lost = ", ".join(f"{text.capitalize()} {point[f'{text}_change'][0]:+.3f}" for text in ("lee", "brown"))
    inside = f"outside: {', '.join(misses)}" if misses else "within the interval of dense int8 on both texts"
    return f"quality {inside} ({lost})"


def draw(points: Sequence[Point], file: Path) -> None:
    """Draw quality on both texts against the time of 32 texts, left, and against the size of the file, right."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "sparsify", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 6), sharey="row", layout="constrained")
    for row, (text, title) in enumerate((("lee", "news: r with ratings"), ("brown", "Brown: same file nearest"))):
        for column, label in enumerate(("ms for 32 texts of 128 tokens", "MB of the file")):
            panel = panels[row][column]
            for kind, color in _COLORS.items():
                mine = [p for p in points if p["kind"] == kind]
                xs = [p["ms_32"][0] if column == 0 else p["file_bytes"] / 1e6 for p in mine]
                panel.scatter(xs, [p[text][0] for p in mine], color=color, s=16, label=kind)
                for x, p in zip(xs, mine, strict=True):
                    panel.annotate(_label(p), (x, p[text][0]), fontsize=6, xytext=(3, 2), textcoords="offset points")
            best = min((p for p in points if p["kind"] == "dense int8"), key=lambda p: p["ms_32"][0], default=None)
            if best is not None:
                panel.axhspan(*best[text][1:], color="#ee6677", alpha=0.08)
            panel.set_xlabel(label)
        panels[row][0].set_ylabel(title)
    panels[0][1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _label(point: Point) -> str:
    name = str(point["point"])
    return (
        name.removeprefix(f"{point['kind']} ")
        .replace("recovered", "rec.")
        .removesuffix(" int8")
        .removesuffix(" float32")
    )


def _excess(point: Point, fastest: dict[int, Point], smallest: Point) -> float:
    """Return the largest of a point's size and times as shares of dense int8's best."""
    times = [point[f"ms_{batch}"][0] / fastest[batch][f"ms_{batch}"][0] for batch in fastest]
    return float(max(*times, point["file_bytes"] / smallest["file_bytes"]))


def _figure(value: Sequence[float], sign: str = "") -> str:
    return f"{value[0]:{sign}.3f} [{value[1]:{sign}.2f}, {value[2]:{sign}.2f}]"

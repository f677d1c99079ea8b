"""docs/results/speed.md: written from the files of a benchmark, nothing typed in."""

from collections.abc import Sequence
from typing import Any

from prose import filled

from benchmarks.tables import Record, losses, spread, tables
from sparsify.hardware.timing import disturbance

TITLES = {
    "layers": "Layers: `CSRLinear` as `export` makes it, everything included",
    "kernels": "Kernels alone",
    "gpu": "On a GPU, against cuBLAS in the same dtype",
    "models": "Whole models",
    "load": "Latency beside a busy process",
}
_INTRO = """# Results

Written by `scripts/bench.py report` from measurements; nothing here is typed in by hand. All candidates of a cell are
timed in turns, in shuffled rounds, by the same number of threads; a time is the median of the rounds, a ratio is one
of medians, a mean of ratios is geometric. The peers are at their best: ONNX Runtime and OpenVINO with packed weights
and fixed buffers, bfloat16 on input that is bfloat16 already. "best dense fp32" is the fastest of ONNX Runtime,
OpenVINO and torch in each cell. "torch csr" is `F.linear(x, csr)`; "torch csr matmul" is `csr @ x.T`, which is faster
but leaves its result transposed. Figures from a GPU stand below if there are any: until `scripts/bench.py gpu` has run
on one, nothing on a GPU is measured.
"""
_ACCURACY = """What sparsity costs in accuracy when a model is trained with it: [training.md](training.md);
when it is pruned afterwards: [oneshot.md](oneshot.md).

![Accuracy against sparsity, a line per method](training.svg)
"""


def page(records: Sequence[Record], picture: str | None = None) -> str:
    """Write the page; `picture` is the path of the image, as seen from it."""
    parts = [_INTRO]
    if picture:
        parts.append(f"![Speed against sparsity, a line per peer]({picture})\n")
        parts.append(_ACCURACY)
    for record in sorted(records, key=lambda r: list(TITLES).index(r["benchmark"])):
        parts.append(_section(record))
    return "\n".join(parts)


def _section(record: Record) -> str:
    machine = record["machine"]
    lines = [
        f"## {TITLES[record['benchmark']]}",
        f"    {record['command']}\n",
        filled(
            f"{record['date']}. {machine['name']}; {machine['cores']} cores, "
            f"{machine['last_level_cache_bytes'] >> 20} MiB last-level cache. "
            f"{', '.join(f'{k} {v}' for k, v in record['versions'].items())}."
        ),
        f"{disturbance(machine['others_cores'])}.",
        f"Spread: {spread(record)}.",
        *(filled(f"Not measured: {peer} ({why}).") for peer, why in record["absent"].items()),
        "",
    ]
    for title, table in tables(record).items():
        lines += [f"### {title}", *_markdown(table), ""]
    if record["benchmark"] == "layers":
        lost = losses(record)
        lines += ["### Where sparse loses", *(filled(f"- {line}") for line in lost or ["nowhere in these cells"]), ""]
    return "\n".join(lines)


def _markdown(table: list[list[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in table[0][1:])]
    return ["| " + " | ".join(_escape(cell) for cell in line) + " |" for line in (table[0], rule, *table[1:])]


def _escape(cell: Any) -> str:
    return str(cell).replace("|", r"\|").replace(" *", r" \*")

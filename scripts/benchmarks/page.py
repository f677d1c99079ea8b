"""docs/results/speed.md: written from the files of a benchmark, nothing typed in."""

from collections.abc import Mapping
from typing import Any

from prose import filled

from benchmarks.tables import Record, losses, spread, tables
from sparsify.hardware.timing import disturbance

TITLES = {
    "layers": "Layers, everything included",
    "convolutions": "Single 3x3 convolutions, everything included",
    "kernels": "Kernels alone",
    "gpu": "On a GPU, against cuBLAS in the same dtype",
    "models": "Whole models",
    "load": "Latency beside a busy process",
    "deployed": "MiniLM outside of Python",
    "teams": "Thread teams: the library's own against OpenMP's",
}
_INTRO = """# Results

Written by `scripts/bench.py report` from measurements; nothing here is typed in by hand. All candidates of a cell are
timed in turns, in shuffled rounds, by the same number of threads; a time is the median of the rounds, a ratio is one
of medians, a mean of ratios is geometric. The peers are at their best: ONNX Runtime and OpenVINO with packed weights
and fixed buffers, bfloat16 on input that is bfloat16 already. "best dense fp32" is the fastest of ONNX Runtime,
OpenVINO and torch in each cell. "torch csr" is `F.linear(x, csr)`; "torch csr matmul" is `csr @ x.T`, which is faster
but leaves its result transposed. Figures from a GPU stand below if there are any: until `scripts/bench.py gpu` has run
on one, nothing on a GPU is measured.

A section is one run on one processor with one instruction set, and no mean is over two of them: `amx` and `vnni` say
how the peers may multiply int8. A run under `scripts/hide` holds our kernels and all peers to a smaller set.
"""
_ACCURACY = """What sparsity costs in accuracy when a model is trained with it: [training.md](training.md);
when it is pruned afterwards: [oneshot.md](oneshot.md).

![Accuracy against sparsity, a line per method](training.svg)
"""


def page(records: Mapping[str, Record]) -> str:
    """Write the page of records, by the stems of their files: a section for each, never two in one mean.

    Each benchmark of layers has its picture beside the page, STEM.svg.
    """
    order = sorted(records.items(), key=lambda item: (list(TITLES).index(item[1]["benchmark"]), item[0]))
    return "\n".join([_INTRO, _ACCURACY, *(_section(stem, record) for stem, record in order)])


def _section(stem: str, record: Record) -> str:
    machine = record["machine"]
    lines = [
        f"## {TITLES[record['benchmark']]}: {_where(record)}",
        f"    {record['command']}\n",
        filled(
            f"{record['date']}. {machine['name']}; {machine['cores']} cores, "
            f"{machine['last_level_cache_bytes'] >> 20} MiB last-level cache. "
            f"{', '.join(f'{k} {v}' for k, v in record['versions'].items())}."
        ),
        filled(f"Peers may use {', '.join(machine['instructions']) or 'what the processor has'}{_hidden(machine)}."),
        f"{disturbance(machine['others_cores'])}.",
        f"Spread: {spread(record)}.",
        *(filled(f"Not measured: {peer} ({why}).") for peer, why in record["absent"].items()),
        "",
    ]
    if record["benchmark"] == "layers":
        lines += [f"![Speed against sparsity, a line per peer]({stem}.svg)", ""]
    for title, table in tables(record).items():
        lines += [f"### {title}", *_markdown(table), ""]
    if record["benchmark"] == "layers":
        lost = losses(record)
        lines += ["### Where sparse loses", *(filled(f"- {line}") for line in lost or ["nowhere in these cells"]), ""]
    return "\n".join(lines)


def _where(record: Record) -> str:
    machine = record["machine"]
    return machine["name"] if record["benchmark"] == "gpu" else f"{machine['processor']}, {machine['isa']}"


def _hidden(machine: dict[str, Any]) -> str:
    return f"; hidden from all of them: {', '.join(machine['hidden'])}" if machine["hidden"] else ""


def _markdown(table: list[list[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in table[0][1:])]
    return ["| " + " | ".join(_escape(cell) for cell in line) + " |" for line in (table[0], rule, *table[1:])]


def _escape(cell: Any) -> str:
    return str(cell).replace("|", r"\|").replace(" *", r" \*")

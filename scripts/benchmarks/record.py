"""A benchmark's results in a file: command, machine and date, and one row per measurement.

    {"schema": 2, "benchmark": "layers", "command": ..., "date": ..., "machine": {...}, "versions": {...},
     "absent": {peer: why}, "roofs": {...}, "rows": [
     {"candidate": "torch fp32", "shape": [768, 768], "tokens": 1, ...,
      "median_us": 1.0, "low_us": ..., "high_us": ..., "n": 11},
     ...]}

low_us and high_us are the quartiles of n samples. `machine` says the processor, the instruction set of our kernels
(`kernel`), the instructions that the peers see, and those that scripts/hide hid; `isa` names all that in one word.
Runs of several processors or instruction sets are several files, named by `file_name`.
"""

import json
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import isa, peers
from sparsify.hardware.machine import last_level_cache_bytes, machine_name
from sparsify.hardware.timing import Timing
from sparsify.outputs import write_text

SCHEMA = 2
HEADER = ("schema", "benchmark", "command", "date", "machine", "versions", "absent", "roofs", "rows")
TIMES = ("median_us", "low_us", "high_us", "n")

_PACKAGES = ("sparsify-torch", "torch", "torchvision", "transformers", "onnxruntime", "openvino")


def describe(benchmark: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return everything of a record but its roofs and rows."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "command": _command(arguments),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "name": machine_name(),
            **isa.this_machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "last_level_cache_bytes": last_level_cache_bytes(),
        },
        "versions": {"python": platform.python_version()} | {p: v for p in _PACKAGES if (v := peers.version(p))},
        "absent": peers.absent(),
        "roofs": {},
        "rows": [],
    }


def file_name(record: dict[str, Any]) -> str:
    """Return the name of a record's file: benchmark, processor and instruction set; on a GPU its name."""
    machine = record["machine"]
    where = machine["name"] if record["benchmark"] == "gpu" else machine["processor"]
    tail = "" if record["benchmark"] == "gpu" else f"-{machine['isa']}"
    return f"{record['benchmark']}-{isa.slug(where)}{tail}.json"


def row(candidate: str, timing: Timing, **facts: Any) -> dict[str, Any]:
    """Make one row; times become microseconds with four digits."""
    times = (_digits(timing.median_s * 1e6), _digits(timing.low_s * 1e6), _digits(timing.high_s * 1e6), timing.n)
    return {"candidate": candidate, **facts, **dict(zip(TIMES, times, strict=True))}


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record with one row a line, for diff."""
    head = json.dumps({key: record[key] for key in HEADER if key != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(r) for r in record["rows"])
    write_text(path, f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n')


def read(path: Path) -> dict[str, Any]:
    """Read a record. Raises ValueError if the file is none, or of another version."""
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or set(record) != set(HEADER):
        raise ValueError(f"{path}: not a result of scripts/bench.py, schema {SCHEMA}; run the benchmark again")
    return record


def _command(arguments: Sequence[str]) -> str:
    """Return the command that was run, with the features hidden from it and the kernel forced."""
    words = ["scripts/hide", *isa.hidden(), "--"] if isa.hidden() else []
    forced = os.environ.get("SPARSIFY_KERNEL")
    prefix = f"SPARSIFY_KERNEL={shlex.quote(forced)} " if forced else ""
    return prefix + shlex.join([*words, "scripts/bench.py", *arguments])


def _digits(value: float) -> float:
    return float(f"{value:.4g}")

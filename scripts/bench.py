"""Measure sparsify against every other way to multiply here, and write docs/results/speed.md from the figures.

    scripts/bench.py layers --json docs/results     CSRLinear against dense and sparse peers
    scripts/bench.py kernels --json docs/results    kernels alone against the peak of the machine
    scripts/bench.py convolutions --json docs/results   single 3x3 convolutions
    scripts/bench.py gpu --json docs/results        forms for GPUs against cuBLAS, in graph replays
    scripts/bench.py models --json docs/results     whole models
    scripts/bench.py load --json docs/results       latency beside a busy process
    scripts/bench.py deployed --json docs/results   a model outside of Python
    scripts/bench.py teams --json docs/results      the library's own threads against OpenMP's
    scripts/bench.py report docs/results/*.json     docs/results/speed.md and its pictures

Each run is of one processor and one instruction set, and its file is named after them. scripts/hide holds our kernels
and all peers to another set: `scripts/hide avx512 vnni -- scripts/bench.py layers` measures as on AVX2.
--quick takes a minute or less, to see all of it work. Peers not installed are named and left out: pip
install 'sparsify-torch[bench]'. Leave the machine alone meanwhile. For your own model: sparsify bench --model ...
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks import (
    cases,
    convolutions,
    deployed,
    gpu,
    isa,
    kernels,
    layers,
    load,
    models,
    page,
    peers,
    picture,
    record,
    tables,
    teams,
)

from sparsify.hardware.machine import machine_name
from sparsify.hardware.timing import LoadMeter, disturbance
from sparsify.tables import Table

RESULTS_FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
PEERS_IN = ("layers", "convolutions", "models", "load")
#: Stands among what a file lacks until its run ends.
UNFINISHED = {"what comes after the last row": "the run was cut off"}
MODEL_ROUNDS, QUICK_MODEL_ROUNDS = 9, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark, or write the page."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    try:
        if options.benchmark == "report":
            report(options.files, options.out)
        else:
            run(options, argv)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"scripts/bench.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure, print the tables, write the JSON."""
    if options.json and not options.json.resolve().parent.is_dir():
        raise FileNotFoundError(f"--json {options.json}: there is no folder {options.json.resolve().parent}")
    torch.set_num_threads(options.threads)
    if options.benchmark in PEERS_IN:
        isa.check_peers()
    result, watch = record.describe(options.benchmark, argv), LoadMeter()
    result["absent"] |= _left_out(options)
    for peer, why in result["absent"].items():
        print(f"left out: {peer}: {why}", file=sys.stderr)
    if options.benchmark == "gpu":
        result["machine"]["name"] = machine_name(_device(options))
        result["roofs"] = gpu.measure_roofs(_device(options))
    if options.benchmark == "kernels":
        result["roofs"] = before = kernels.measure_roofs()
    file = options.json
    if file and file.is_dir():
        file /= record.file_name(result)
    for row in _measure(options):
        result["rows"].append(row)
        result["machine"]["others_cores"] = watch.others_cores()
        if file:  # a run that is cut off keeps what it has measured
            record.write(result | {"absent": result["absent"] | UNFINISHED}, file)
    if options.benchmark == "kernels":  # the machine may have been disturbed once
        result["roofs"] = {name: max(value, before[name]) for name, value in kernels.measure_roofs().items()}
    result["machine"]["others_cores"] = watch.others_cores()
    for title, lines in tables.tables(result).items():
        print(f"\n{title}\n\n{Table(lines[0], lines[1:]).text()}")
    print(f"\n{result['machine']['name']}; {tables.spread(result)}; {disturbance(result['machine']['others_cores'])}")
    if file:
        record.write(result, file)
        print(file)


def report(files: Sequence[Path], out: Path) -> None:
    """Write the page, and beside it a picture of each benchmark of layers among the files.

    Raises ValueError for two files of one benchmark, processor and instruction set.
    """
    records: dict[str, tables.Record] = {}
    for file in files:
        one = record.read(file)
        stem = Path(record.file_name(one)).stem
        if stem in records:
            raise ValueError(f"{file}: a second run of {stem}; its page would tell them apart by nothing, give one")
        records[stem] = one
    for stem, one in records.items():
        if one["benchmark"] == "layers":
            picture.draw(one, out.with_name(f"{stem}.svg"))
    out.write_text(page.page(records))
    print(out)


def _measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.benchmark == "models":
        chosen = models.QUICK if options.quick else models.MODELS
        if options.models:
            chosen = {name: models.MODELS[name][: 1 if options.quick else None] for name in options.models}
        rounds = options.rounds or (QUICK_MODEL_ROUNDS if options.quick else MODEL_ROUNDS)
        sparsities = tuple(options.sparsity or models.SPARSITIES)
        return models.bench_models(chosen, sparsities, rounds, options.without or ())
    if options.benchmark == "convolutions":
        changed = {"sparsities": options.sparsity, "rounds": options.rounds, "images": options.images}
        return convolutions.run(convolutions.chosen(options.quick, **changed))
    if options.benchmark == "deployed":
        return deployed.run(options.rounds or (2 if options.quick else 15))
    grid = cases.GRIDS[options.benchmark][options.quick]
    wanted: dict[str, Any] = {
        "shapes": options.shapes,
        "tokens": options.tokens,
        "sparsities": options.sparsity,
        "large": options.large,
    }
    changes: dict[str, Any] = {key: tuple(values) for key, values in wanted.items() if values is not None}
    if options.rounds:
        changes["rounds"] = options.rounds
    grid = dataclasses.replace(grid, **changes)
    if options.benchmark == "gpu":
        return gpu.run(grid, gpu.DTYPES[options.dtype], _device(options))
    if options.benchmark == "layers":
        return layers.run(grid, without=options.without or ())
    return {"kernels": kernels.run, "load": load.run, "teams": teams.run}[options.benchmark](grid)


def _left_out(options: argparse.Namespace) -> dict[str, str]:
    """Return the reason for peers that a run leaves out on request. Raises ValueError for a name that is none."""
    names = getattr(options, "without", None) or ()
    known = models.CAN_BE_LEFT_OUT if options.benchmark == "models" else (*peers.DENSE, *peers.SPARSE)
    if odd := [name for name in names if name not in known]:
        raise ValueError(f"--without {odd[0]!r}: none of the peers that can be left out: {', '.join(known)}")
    return dict.fromkeys(names, "left out by --without")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        required=True, dest="benchmark", metavar="kernels|layers|convolutions|gpu|models|load|teams|deployed|report"
    )
    for name in ("kernels", "layers", "convolutions", "gpu", "models", "load", "teams", "deployed"):
        sub = commands.add_parser(name)
        sub.add_argument("--quick", action="store_true", help="a few cells, few rounds")
        sub.add_argument(
            "--json",
            type=Path,
            metavar="PATH",
            help="write every measurement there; in a folder, to a file named after processor and instruction set",
        )
        sub.add_argument("--sparsity", type=float, nargs="+", metavar="S")
        sub.add_argument("--rounds", type=int, metavar="N", help="times each candidate is measured")
        sub.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores, %(default)s")
        if name == "gpu":
            sub.add_argument("--device", default="cuda", help="default: %(default)s")
            sub.add_argument("--dtype", choices=gpu.DTYPES, default="bfloat16", help="default: %(default)s")
        if name in ("layers", "models"):
            sub.add_argument("--without", nargs="+", metavar="PEER", help="candidates to leave out: 'torch csr'")
        if name == "models":
            sub.add_argument("--models", nargs="+", choices=models.MODELS, metavar="NAME", help=" ".join(models.MODELS))
            continue
        if name == "deployed":
            continue
        if name == "convolutions":
            sub.add_argument("--images", type=int, nargs="+", metavar="N", help="images in a batch")
            continue
        sub.add_argument("--tokens", type=int, nargs="+", metavar="N")
        sub.add_argument("--shapes", type=_shape, nargs="+", metavar="OUTxIN")
        sub.add_argument("--large", type=_shape, nargs="*", metavar="OUTxIN", help="weights in rotation, for one token")
    sub = commands.add_parser("report")
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what --json wrote")
    sub.add_argument("--out", type=Path, default=RESULTS_FOLDER / "speed.md", help="default: docs/results/speed.md")
    return parser


def _device(options: argparse.Namespace) -> torch.device:
    """Return the GPU to measure. Raises RuntimeError if there is none."""
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device here; the forms for GPUs are measured on one")
    return torch.empty(0, device=options.device).device


def _shape(text: str) -> cases.Shape:
    out, _, in_ = text.partition("x")
    if not (out.isdigit() and in_.isdigit() and int(out) and int(in_)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write OUTxIN, as 768x3072")
    return int(out), int(in_)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Why not just int8? Quality against latency and file size of MiniLM: dense engines, and pruned models of sparsify.

    scripts/tradeoff.py prune                     the pruned models, to .assets/tradeoff: some 40 minutes
    scripts/tradeoff.py prune --recover 0         without recovery: some 10 minutes
    scripts/tradeoff.py measure                   every point, in turns in one process: some 15 minutes
    scripts/hide avx512 vnni -- scripts/tradeoff.py measure     the same as on AVX2
    scripts/tradeoff.py report                    docs/results/tradeoff.md and its pictures

The encoder is pruned by ALPS with correction on news (Lee background) and Wikipedia; recovered models are then
distilled for --recover seconds on all text of both, with masks that move. Quality is measured on 50 other news
documents and on passages of the Brown corpus, which is nowhere in the calibration data. Recovered int8 models are
measured as packages of AOTInductor (.pt2) too, which a call enters without the Python of transformers. Points are kept
in docs/results/tradeoff.jsonl, a line each, with the processor and instruction set.
"""

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from assets import ASSETS, fetch
from benchmarks import isa
from pretrained import minilm
from torch import Tensor, nn
from tradeoff_points import page
from tradeoff_points.quality import Judge, fixed_inputs

import sparsify
from sparsify.hardware.machine import machine_name
from sparsify.hardware.timing import LoadMeter, Timing, measure
from sparsify.pruning.precision import multiplies_bfloat16
from sparsify.reporting.dense_engines import dense_engines

RESULTS_FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
OUT = RESULTS_FOLDER / "tradeoff.jsonl"
PRUNED = ASSETS / "tradeoff"
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
BATCHES = (1, 32)
ROUNDS = 11
#: Pieces of text to calibrate on, and the learning rate of a recovery on small batches.
N_PIECES, LR = 480, 2e-3
#: Batch size -> a call that returns the hidden states of inputs of that size.
Calls = dict[int, Callable[[], Tensor]]
#: Candidate -> options of its export.
EXPORTS: dict[str, dict[str, Any]] = {
    "sparsify float32": {},
    "sparsify int8": {"quantize": "int8", "quantize_rest": True},
}
PACKAGE = "sparsify int8 .pt2"


def main(argv: Sequence[str] | None = None) -> int:
    """Prune, measure or report."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    for name in ("minilm", "lee", "brown"):
        fetch(name)
    if options.task == "prune":
        prune(options.pruned, options.sparsity, options.method, options.recover)
    elif options.task == "measure":
        isa.check_peers()
        points = list(measure_points(options.pruned, options.sparsity, options.rounds))
        with options.out.open("a") as file:
            file.writelines(json.dumps(point) + "\n" for point in points)
        print(page.table([point | {"run": ""} for point in points]))
    else:
        page.write(page.read(options.out), RESULTS_FOLDER / "tradeoff.md")
    return 0


def prune(folder: Path, sparsities: Sequence[float], method: str, recover_s: float) -> None:
    """Prune the encoder to each sparsity, and save it, once as it is and once recovered."""
    folder.mkdir(parents=True, exist_ok=True)
    dense, batches = minilm.load_dense(), minilm.mixed_batches(N_PIECES)
    for sparsity in sparsities:
        model = sparsify.convert(copy.deepcopy(dense), include=minilm.ENCODER_LAYERS)
        more: dict[str, Any] = {} if method == "magnitude" else {"data": batches, "correct": True, "progress": True}
        sparsify.prune(model, sparsity, method=method, **more)
        sparsify.save(model, folder / f"{sparsity:g}.safetensors")
        if recover_s:
            teacher = sparsify.convert(copy.deepcopy(dense), include=minilm.ENCODER_LAYERS)
            how: dict[str, Any] = {"lr": LR, "bfloat16": multiplies_bfloat16(), "move": "unstructured"}
            sparsify.recover(model, teacher, minilm.all_batches(), seconds=recover_s, progress=True, **how)
            sparsify.save(model, folder / f"{sparsity:g}-recovered.safetensors")


@torch.inference_mode()
def measure_points(pruned: Path, sparsities: Sequence[float], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the row of each candidate: time at each batch size, bytes in a file, and quality.

    Raises FileNotFoundError if a sparsity has no pruned model.
    """
    watch, dense = LoadMeter(), minilm.load_dense()
    inputs = {batch: fixed_inputs(batch) for batch in BATCHES}
    judge = Judge.of(lambda: dense(**inputs[32]).last_hidden_state, inputs[32])
    facts: dict[str, dict[str, Any]] = {}
    calls: dict[int, dict[str, list[Any]]] = {batch: {} for batch in BATCHES}
    with TemporaryDirectory() as scratch:
        for name, at_batch, n_bytes, more in _candidates(dense, inputs, pruned, sparsities, Path(scratch)):
            print(name, flush=True)
            facts[name] = {"file_bytes": n_bytes, **more, **judge.quality(at_batch[32], inputs[32])}
            for batch in BATCHES:
                calls[batch][name] = [at_batch[batch]]
        times = {batch: measure(calls[batch], rounds=rounds) for batch in BATCHES}
    common = {
        **isa.this_machine(),
        "machine": machine_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "others_cores": watch.others_cores(),
    }
    for name, fact in facts.items():
        yield {"point": name, **fact, **{f"ms_{b}": _ms(times[b][name]) for b in BATCHES}, **common}


def _candidates(
    dense: nn.Module, inputs: dict[int, dict[str, Tensor]], pruned: Path, sparsities: Sequence[float], scratch: Path
) -> Iterator[tuple[str, Calls, int, dict[str, Any]]]:
    """Yield each candidate's name, its calls by batch size, the bytes of its file, and facts for its row."""
    yield "torch float32", _calls(dense, inputs), minilm.DENSE_FILE.stat().st_size, {"kind": "dense float32"}
    for batch in BATCHES:
        (scratch / str(batch)).mkdir()
    engines = zip(*(dense_engines(dense, inputs[batch], scratch / str(batch)) for batch in BATCHES), strict=True)
    for pair in engines:
        name = pair[0].name
        calls = {batch: engine.call for batch, engine in zip(BATCHES, pair, strict=True) if engine.call is not None}
        if len(calls) < len(BATCHES):
            print(f"{name} is left out: {' '.join(engine.why for engine in pair)}")
            continue
        kind = "dense int8" if name.endswith("int8") else "dense float32"
        yield name, calls, pair[1].n_bytes or 0, {"kind": kind}
    for sparsity in sparsities:
        for ending in ("", "-recovered"):
            file = pruned / f"{sparsity:g}{ending}.safetensors"
            if not file.exists():
                if not ending:
                    raise FileNotFoundError(f"{file} is not there; run scripts/tradeoff.py prune")
                continue
            for kind, options in EXPORTS.items():
                name = f"{kind} {sparsity:.0%}{ending.replace('-', ', ')}"
                yield _ours(name, kind, sparsify.load(file, minilm.load_dense()), inputs, options, scratch)
            if ending:
                yield _package(f"{PACKAGE} {sparsity:.0%}, recovered", file, inputs, scratch)


def _ours(
    name: str,
    kind: str,
    masked: nn.Module,
    inputs: dict[int, dict[str, Tensor]],
    options: dict[str, Any],
    scratch: Path,
) -> tuple[str, Calls, int, dict[str, Any]]:
    """Export a pruned model for each batch size; the file of both is the same."""
    fast = {batch: sparsify.export(masked, example=inputs[batch], **options) for batch in BATCHES}
    file = scratch / "ours.safetensors"
    sparsify.save(fast[32], file)
    calls = {batch: _calls(fast[batch], {batch: inputs[batch]})[batch] for batch in BATCHES}
    forms = [row.format for row in sparsify.report(fast[32])]
    return name, calls, file.stat().st_size, {"kind": kind, "forms": {form: forms.count(form) for form in set(forms)}}


class _Hidden(nn.Module):
    """A model whose output is the hidden states alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states, (texts, tokens, hidden)."""
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


@torch.inference_mode(False)
@torch.no_grad()
def _package(
    name: str, file: Path, inputs: dict[int, dict[str, Tensor]], scratch: Path
) -> tuple[str, Calls, int, dict[str, Any]]:
    """Export a pruned model in int8, and compile a package for each batch size; the larger file counts."""
    calls, n_bytes = {}, 0
    for batch, given in inputs.items():
        fast = sparsify.export(sparsify.load(file, minilm.load_dense()), example=given, **EXPORTS["sparsify int8"])
        package = scratch / f"{batch}.pt2"
        package.unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler
            program = torch.export.export(_Hidden(fast.requires_grad_(False)), (), dict(given))
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        calls[batch] = partial(torch._inductor.aoti_load_package(str(package)), **given)
        n_bytes = max(n_bytes, package.stat().st_size)
    return name, calls, n_bytes, {"kind": PACKAGE}


def _calls(model: nn.Module, inputs: dict[int, dict[str, Tensor]]) -> Calls:
    def call(values: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: model(**values).last_hidden_state

    return {batch: call(values) for batch, values in inputs.items()}


def _ms(timing: Timing) -> list[float]:
    return [float(f"{1e3 * seconds:.4g}") for seconds in (timing.median_s, timing.low_s, timing.high_s)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("prune", "measure", "report"))
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES, metavar="S")
    parser.add_argument("--method", default="alps", choices=("alps", "sparsegpt", "magnitude"))
    parser.add_argument("--recover", type=float, default=240, metavar="SECONDS", help="default: %(default)s; 0: do not")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--pruned", type=Path, default=PRUNED, metavar="FOLDER", help="default: .assets/tradeoff")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: docs/results/tradeoff.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""MiniLM at 80% in Python, and as a package of AOTInductor without this package: in Python and in C++, in turns."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pretrained import minilm
from torch import nn
from tqdm import tqdm

import sparsify
from benchmarks import record
from benchmarks.processes import Process, answer_all, seconds_of_calls
from sparsify.hardware.timing import Timing

OURS, PACKAGE, PROGRAM = "sparsify, Python", "AOTInductor, Python", "AOTInductor, C++"
SPARSITY, FORM, TEXTS, TOKENS = 0.8, "panel", 1, 128
CALLS_OF_ROUND, LONGEST_S = 40, 2.0
_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "aotinductor"
#: A process that never imports sparsify.
_WITHOUT_US = """
import ctypes, json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
assert ctypes.CDLL(sys.argv[2]).sparsify_register_torch() == 0
model, inputs = torch._inductor.aoti_load_package(sys.argv[3] + "/model.pt2"), torch.load(sys.argv[3] + "/inputs.pt")
with torch.no_grad():
    for line in sys.stdin:
        seconds, calls = [], json.loads(line)["calls"]
        for number in range(calls + 3):
            start = time.perf_counter()
            model(*inputs)
            seconds += [time.perf_counter() - start] if number > 2 else []
        assert "sparsify" not in sys.modules
        print(json.dumps(seconds), flush=True)
"""


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate; a sample is the median of a round's calls."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        _write(place)
        threads, library = str(torch.get_num_threads()), str(sparsify.native_paths().shared_library)
        processes = {
            OURS: Process("from benchmarks import deployed; deployed.answer()", threads, folder),
            PACKAGE: Process(_WITHOUT_US, threads, library, folder),
        }
        program = _build(place)
        samples: dict[str, list[float]] = {name: [] for name in (*processes, *([PROGRAM] if program else []))}
        try:
            for _ in tqdm(range(rounds), desc="deployed"):
                for name, process in processes.items():
                    samples[name].append(median(process.ask({"calls": CALLS_OF_ROUND})))
                if program:
                    samples[PROGRAM].append(_run(program, place))
        finally:
            for process in processes.values():
                process.end()
    for name, seconds in samples.items():
        yield record.row(name, Timing.of(seconds), model="minilm", batch=TEXTS, tokens=TOKENS, sparsity=SPARSITY)


def _minilm() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return the exported model and its inputs."""
    dense: Any = minilm.load_dense()
    dense.config.return_dict = False  # a process without transformers reads no class of its outputs
    model = sparsify.convert(dense, include=minilm.ENCODER_LAYERS)
    ids = torch.randint(1000, 20000, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0))
    return sparsify.export(sparsify.prune(model, SPARSITY), format=FORM), (ids, torch.ones_like(ids))


def _write(place: Path) -> None:
    """Write the exported model, its package and an input."""
    model, inputs = _minilm()
    fast = model.requires_grad_(False)
    torch.save(fast, place / "model.pt")
    torch.save(inputs, place / "inputs.pt")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        program = torch.export.export(fast, inputs)
        torch._inductor.aoti_compile_and_package(program, package_path=str(place / "model.pt2"))
    for number, tensor in enumerate(inputs):
        (place / f"input{number}").write_bytes(tensor.numpy().tobytes())


def _build(place: Path) -> Path | None:
    """Build the example in C++; return its program, or None without CMake."""
    if not shutil.which("cmake"):
        print("scripts/bench.py deployed: no cmake: the C++ program is left out", file=sys.stderr)
        return None
    build, of_torch = str(place / "build"), Path(torch.__file__).parent
    where = [f"-Dsparsify_DIR={sparsify.native_paths().cmake}", f"-DTORCH={of_torch}"]
    for command in (["cmake", "-S", str(_EXAMPLE), "-B", build, *where], ["cmake", "--build", build]):
        subprocess.run(command, check=True, capture_output=True)
    return place / "build" / "run_package"


def _run(program: Path, place: Path) -> float:
    """Return the median seconds of a round in C++."""
    inputs = [f"i64:{TEXTS}x{TOKENS}:{place / f'input{number}'}" for number in range(2)]
    command = [program, place / "model.pt2", place / "out", str(CALLS_OF_ROUND), *inputs]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=threads)
    found = re.search(r"([\d.]+) ms on", done.stdout)
    assert found is not None, done.stdout
    return float(found[1]) / 1e3


@torch.inference_mode()
def answer() -> None:
    """Answer questions as the process with this package."""
    torch.set_num_threads(int(sys.argv[1]))
    model, inputs = (torch.load(f"{sys.argv[2]}/{name}.pt", weights_only=False) for name in ("model", "inputs"))
    answer_all(lambda question: seconds_of_calls(lambda: model(*inputs), question["calls"], LONGEST_S))

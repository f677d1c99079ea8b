"""Show sparsify on a real model: prune MiniLM-L6 by a recipe, save it, compare it with the dense model.

    scripts/demo                     # 80% of the encoder's weights by ALPS, on 300 documents: the README's table
    scripts/demo --sparsity 0.7      # another value for the recipe's variable
    scripts/demo --recipe magnitude-50    # faster, without data; any name of `sparsify recipes`, or a file

Every number about the sparse model is taken in a new process, from the saved file loaded onto random weights: the
table shows the contents of the file, and nothing of the pruning process.
The file and the table stay in .assets/demo/.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from assets import ASSETS
from pretrained import minilm
from torch import nn
from tqdm import tqdm

import sparsify
from sparsify.tables import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = ASSETS / "demo"
N_TOKENS = 128
REPEATS = {1: 40, 32: 10}  # batch size -> timed runs of each model


def main() -> None:
    """Prune and save here, measure in a new process, print the table."""
    parser = argparse.ArgumentParser(description="Prune MiniLM-L6, save it, and compare it with the dense model.")
    parser.add_argument("--recipe", type=Path, default=Path("alps-80"), help="a file or a name (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, help="the recipe's variable; default: what the recipe says")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="only measure a saved file, and print JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return

    started = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    suffix = "" if options.sparsity is None else f"-sparsity-{options.sparsity:g}"
    file = OUT / f"minilm-{options.recipe.stem}{suffix}.safetensors"
    try:
        compress(options.recipe, options.sparsity, file)
    except (OSError, ValueError) as error:  # a recipe that is not there, is wrong, or needs training
        sys.exit(f"scripts/demo: {error}")
    print("measuring dense and sparse in a new process")
    child = subprocess.run(
        [sys.executable, __file__, "--measure", str(file)], check=True, stdout=subprocess.PIPE, text=True
    )
    text = comparison(json.loads(child.stdout.splitlines()[-1]))
    file.with_suffix(".txt").write_text(text + "\n")
    print(f"\n{text}\n\n{time.perf_counter() - started:.0f} s. Look inside the saved file:\n")
    print(f"    .venv/bin/sparsify inspect {os.path.relpath(file, ROOT)}")


def compress(recipe_file: Path, sparsity: float | None, file: Path) -> None:
    """Prune the pretrained model's encoder as the recipe says, export it, and save it to `file`."""
    print(f"pruning MiniLM-L6 by {recipe_file.name}")
    model = minilm.load_dense()
    variables: dict[str, Any] = {"layers": minilm.ENCODER_LAYERS}
    if sparsity is not None:
        variables["sparsity"] = sparsity
    sparsify.convert(model, include=minilm.ENCODER_LAYERS)
    recipe = sparsify.load_recipe(recipe_file, **variables)
    needs_data = recipe.recover is not None or any(group.needs_data for group in recipe.groups)
    sparsify.apply(model, recipe, data=minilm.calibration_batches() if needs_data else None, progress=True)
    sparsify.save(sparsify.export(model), file)


def measure(file: Path) -> dict[str, Any]:
    """Measure the pretrained model and the one saved in `file`, loaded onto random weights.

    Returns {"dense": {...}, "sparse": {...}} with the same keys, for `comparison`.
    """
    dense = minilm.load_dense()
    sparse = sparsify.load(file, minilm.build_fresh())
    n_parameters = sum(parameter.numel() for parameter in dense.parameters())

    ratings = minilm.lee_ratings()
    documents = minilm.lee_documents()
    embeddings = {
        "dense": minilm.embed(documents, dense, progress="quality, dense"),
        "sparse": minilm.embed(documents, sparse, progress="quality, sparse"),
    }
    times_ms = {batch: latency_ms({"dense": dense, "sparse": sparse}, batch) for batch in REPEATS}
    measured: dict[str, Any] = {}
    for name, vectors in embeddings.items():
        measured[name] = {
            "lee": [minilm.lee_correlation(vectors, ratings), *minilm.lee_interval(vectors, ratings)],
            "cosine": minilm.mean_cosine(vectors, embeddings["dense"]),
            **{f"ms_batch_{batch}": times_ms[batch][name] for batch in REPEATS},
        }
    formats = Counter(row.format for row in sparsify.report(sparse) if row.name.startswith("encoder.layer."))
    sparse_bytes = resident_bytes(sparse)
    # Last, since it takes the CSR layers apart: count zeros in the weights themselves, whatever format held them.
    weights = [layer.weight for layer in minilm.encoder_linears(sparsify.to_dense(sparse)).values()]
    n_weights = sum(weight.numel() for weight in weights)
    n_zeros = sum(int((weight == 0).sum()) for weight in weights)
    measured["dense"] |= {
        "n_parameters": n_parameters,
        "sparsity": 0.0,
        "file_bytes": minilm.DENSE_FILE.stat().st_size,
        "weight_bytes": resident_bytes(dense),
    }
    measured["sparse"] |= {
        "n_parameters": n_parameters - n_zeros,
        "sparsity": n_zeros / n_weights,
        "file_bytes": file.stat().st_size,
        "weight_bytes": sparse_bytes,
    }
    return measured | {"formats": ", ".join(f"{n} {name}" for name, n in formats.items())}


def resident_bytes(model: nn.Module) -> int:
    """Add up the parameters and buffers a model holds in memory, shared ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def latency_ms(models: dict[str, nn.Module], batch: int) -> dict[str, list[float]]:
    """Time each model on the same random tokens, taking turns: a busy moment hits all of them alike."""
    ids = torch.randint(1000, 30000, (batch, N_TOKENS), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(ids)  # warm-up
        for _ in tqdm(range(REPEATS[batch]), desc=f"latency, batch {batch}", unit="round", disable=None):
            for name, model in models.items():
                started = time.perf_counter()
                model(ids)
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def comparison(measured: dict[str, Any]) -> str:
    """Lay out the figures of `measure`: one line each, dense beside sparse, and their ratio."""
    dense, sparse = measured["dense"], measured["sparse"]
    lines = []
    for label, key, text, with_ratio in MEASURES:
        ratio = f"{_middle(sparse[key]) / _middle(dense[key]):.2f}x" if with_ratio else ""
        lines.append((label, text(dense[key]), text(sparse[key]), ratio))
    return f"""{Table(("MiniLM-L6", "dense", "sparse", "sparse/dense"), lines).text()}

latency: median (fastest to slowest) of {" and ".join(map(str, REPEATS.values()))} runs taken in turns, \
{torch.get_num_threads()} threads, {_processor()}, torch {torch.__version__}
the encoder's Linear layers, by format: {measured["formats"]}"""


def _middle(value: float | list[float]) -> float:
    return median(value) if isinstance(value, list) else value


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def _spread(times_ms: list[float]) -> str:
    return f"{median(times_ms):.1f} ({min(times_ms):.1f} to {max(times_ms):.1f}) ms"


def _interval(value: list[float]) -> str:
    return f"{value[0]:.3f} [{value[1]:.2f}, {value[2]:.2f}]"


def _processor() -> str:
    """Name the processor: Linux keeps its name in /proc/cpuinfo; elsewhere the architecture has to do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# One line of the table each: label, key in the result of `measure`, format of the value, True if a ratio makes sense.
MEASURES: list[tuple[str, str, Callable[[Any], str], bool]] = [
    ("parameters, non-zero", "n_parameters", "{:,}".format, True),
    ("sparsity of the encoder's layers", "sparsity", "{:.2%}".format, False),
    ("file", "file_bytes", _megabytes, True),
    ("weights in memory", "weight_bytes", _megabytes, True),
    (f"latency, batch 1 x {N_TOKENS} tokens", "ms_batch_1", _spread, True),
    (f"latency, batch 32 x {N_TOKENS} tokens", "ms_batch_32", _spread, True),
    ("Lee correlation [95% interval]", "lee", _interval, False),
    ("mean cosine to the dense embeddings", "cosine", "{:.3f}".format, False),
]

if __name__ == "__main__":
    main()

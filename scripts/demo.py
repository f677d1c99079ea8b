"""Show what sparsify does to a real model: prune MiniLM-L6 by a recipe, save it, compare it with the dense model.

    scripts/demo                     # 50% of the encoder's weights, recipes/magnitude-50.yaml
    scripts/demo --sparsity 0.8      # another value for the recipe's variable

Every number about the sparse model is taken in a new process, which builds the architecture with random weights and
loads the saved file onto it: what the table shows is what the file holds, and nothing of the pruning process is left.
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

import minilm
import torch
from assets import ASSETS
from torch import nn
from tqdm import tqdm

import sparsify
from sparsify.report import table

ROOT = Path(__file__).resolve().parent.parent
OUT = ASSETS / "demo"
N_TOKENS = 128
REPEATS = {1: 40, 32: 10}  # batch size -> timed runs of each model

Row = tuple[str, str, str]


def main() -> None:
    """Prune and save here, measure in a new process, print the table."""
    parser = argparse.ArgumentParser(description="Prune MiniLM-L6, save it, and compare it with the dense model.")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/magnitude-50.yaml", help="default: %(default)s")
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
    compress(options.recipe, options.sparsity, file)
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
    sparsify.apply(model, sparsify.load_recipe(recipe_file, **variables))
    sparsify.save(sparsify.export(model), file)


def measure(file: Path) -> dict[str, Any]:
    """Measure the pretrained model and the one saved in `file`, which is loaded onto random weights.

    Returns {"dense": {...}, "sparse": {...}} with the same keys, which `comparison` reads.
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
    measured: dict[str, Any] = {
        name: {
            "lee": minilm.lee_correlation(embeddings[name], ratings),
            "lee_interval": minilm.lee_interval(embeddings[name], ratings),
            "cosine": minilm.mean_cosine(embeddings[name], embeddings["dense"]),
            "times_ms": {str(batch): times_ms[batch][name] for batch in REPEATS},
        }
        for name in embeddings
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
    return measured | {"n_layers": len(weights), "formats": formats}


def resident_bytes(model: nn.Module) -> int:
    """Add up the parameters and buffers a model holds in memory, shared ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def latency_ms(models: dict[str, nn.Module], batch: int) -> dict[str, list[float]]:
    """Time each model on the same random tokens, taking turns, so that a busy moment hits all of them alike."""
    ids = torch.randint(1000, 30000, (batch, N_TOKENS), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(ids)  # warm-up
        for _ in tqdm(range(REPEATS[batch]), desc=f"latency, batch {batch}", unit="round"):
            for name, model in models.items():
                started = time.perf_counter()
                model(ids)
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def comparison(measured: dict[str, Any]) -> str:
    """Lay out what `measure` found: one line per measure, dense beside sparse."""
    dense, sparse = measured["dense"], measured["sparse"]

    def row(label: str, value: Callable[[dict[str, Any]], str]) -> Row:
        return label, value(dense), value(sparse)

    rows = [
        ("MiniLM-L6", "dense", "sparse"),
        row("parameters, non-zero", lambda side: f"{side['n_parameters']:,}"),
        row(f"sparsity of the {measured['n_layers']} encoder layers", lambda side: f"{side['sparsity']:.2%}"),
        row("file", lambda side: f"{side['file_bytes'] / 1e6:.1f} MB"),
        row("weights in memory", lambda side: f"{side['weight_bytes'] / 1e6:.1f} MB"),
        *(_latency_row(batch, dense, sparse) for batch in REPEATS),
        row("Lee correlation [95% interval]", lambda side: _interval(side["lee"], side["lee_interval"])),
        row("mean cosine to the dense embeddings", lambda side: f"{side['cosine']:.3f}"),
    ]
    return f"""{table(rows)}

latency: median (fastest to slowest) of {" and ".join(map(str, REPEATS.values()))} runs taken in turns, \
{torch.get_num_threads()} threads, {_processor()}, torch {torch.__version__}
the encoder's layers run as: {", ".join(f"{n} {name}" for name, n in measured["formats"].items())}"""


def _latency_row(batch: int, dense: dict[str, Any], sparse: dict[str, Any]) -> Row:
    label = f"latency, batch {batch} x {N_TOKENS} tokens"
    return label, _spread(dense["times_ms"][str(batch)]), _spread(sparse["times_ms"][str(batch)])


def _spread(times_ms: list[float]) -> str:
    return f"{median(times_ms):.1f} ({min(times_ms):.1f} to {max(times_ms):.1f}) ms"


def _interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _processor() -> str:
    """Name the processor; Linux keeps that in /proc/cpuinfo, elsewhere the architecture has to do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()

"""Prune a model larger than the memory it may use, kill the run half-way, resume it, and compare the files.

    .venv/bin/python scripts/bigmodel.py              # 4 GB of float32 weights, SparseGPT at 50%; needs 12 GB of disk
    .venv/bin/python scripts/bigmodel.py --gb 0.5     # a smaller one

The weights are random, of Llama's shape, written block by block. Everything is run through the command line; printed
are the time and the peak of resident memory of each run. Exits with 1 if a run needed more than --limit-gb, or if the
files of the resumed and the whole run differ.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from assets import ASSETS
from safetensors.torch import save_file
from torch import Tensor

SCRIPTS = Path(__file__).resolve().parent
N_BATCHES, BATCH, N_TOKENS = 4, 4, 256  # rows enough for the Gram matrix of the widest layer, 2816


@dataclass(frozen=True)
class Shape:
    """The size of a Llama: per block 2 hidden^2 (1 + kv_heads / heads) + 3 hidden x inner weights."""

    hidden: int = 1024
    inner: int = 2816
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 8192

    @property
    def block_bytes(self) -> int:
        """The bytes of one block in float32."""
        own = 2 * self.hidden**2 * (1 + self.kv_heads / self.heads) + 3 * self.hidden * self.inner
        return 4 * (int(own) + 2 * self.hidden)


def write_model(folder: Path, n_blocks: int, shape: Shape) -> int:
    """Write config and weights in transformers' layout, one file a block with an index; returns the weights' bytes."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": n_blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    n_bytes = 0
    for number in range(-1, n_blocks):
        sizes = _ends(shape) if number < 0 else _block(number, shape)
        tensors = {name: _random(size, generator) for name, size in sizes.items()}
        file = f"model-{number + 1:05}.safetensors"
        save_file(tensors, folder / file)
        where.update(dict.fromkeys(tensors, file))
        n_bytes += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return n_bytes


def data() -> Iterator[dict[str, Tensor]]:
    """Make the calibration data: random tokens."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(N_BATCHES):
        yield {"input_ids": torch.randint(1000, (BATCH, N_TOKENS), generator=generator)}


def run(folder: Path, out: Path, *, stop_at: int | None = None, resume: bool = False) -> tuple[float, float]:
    """Compress from the command line, and kill the process once `stop_at` layers are finished.

    Returns the seconds it took, and the peak of its resident memory in GB.
    """
    options = ["--method", "sparsegpt", "--sparsity", "0.5", "--include", "model.layers.*", "--format", "csr"]
    command = [sys.executable, "-m", "sparsify", "compress", "--model", f"hf:{folder}", "--data", "bigmodel:data"]
    command += [*options, "--stream", *(["--resume"] if resume else []), "--cache", "0.1", "--json", "--out", str(out)]
    root = str(SCRIPTS.parent)
    paths = os.pathsep.join([str(SCRIPTS), root, os.environ.get("PYTHONPATH", "")])
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    finished = out.with_name(out.name + ".partial")
    while process.poll() is None:
        peak = max(peak, _peak_bytes(process.pid))
        if stop_at is not None and len(list(finished.glob("*.safetensors"))) >= stop_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.2)
    if process.returncode != (0 if stop_at is None else -signal.SIGKILL):
        sys.exit(f"scripts/bigmodel.py: the run ended with exit code {process.returncode}")
    return time.perf_counter() - started, peak / 1e9


def main() -> int:
    """Do all of it, and print times and memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=4.0, help="of float32 weights (default: %(default)s)")
    parser.add_argument("--limit-gb", type=float, default=3.0, help="of resident memory (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ASSETS / "bigmodel", help="emptied first and deleted afterwards")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    shape = Shape()
    n_blocks = max(2, round(options.gb * 1e9 / shape.block_bytes))
    n_bytes = write_model(options.folder / "model", n_blocks, shape)
    print(f"{n_bytes / 1e9:.2f} GB of weights in {n_blocks} blocks", flush=True)
    whole, resumed = options.folder / "whole.safetensors", options.folder / "resumed.safetensors"
    peaks = []
    for label, arguments in {
        "whole run": {"out": whole},
        "killed half-way": {"out": resumed, "stop_at": 7 * n_blocks // 2},
        "resumed": {"out": resumed, "resume": True},
    }.items():
        seconds, peak = run(options.folder / "model", **arguments)
        peaks.append(peak)
        print(f"{label}: {seconds:.0f} s, at most {peak:.2f} GB resident", flush=True)
    same = subprocess.run(["cmp", str(whole), str(resumed)], check=False).returncode == 0
    print(f"file: {whole.stat().st_size / 1e9:.2f} GB; resumed file {'identical' if same else 'DIFFERENT'}")
    shutil.rmtree(options.folder)
    return 0 if same and max(peaks) <= options.limit_gb else 1


def _ends(shape: Shape) -> dict[str, tuple[int, ...]]:
    return {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden), "model.norm.weight": (shape.hidden,)}


def _block(number: int, shape: Shape) -> dict[str, tuple[int, ...]]:
    kv = shape.hidden * shape.kv_heads // shape.heads
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
        "input_layernorm": (shape.hidden,),
        "post_attention_layernorm": (shape.hidden,),
    }
    return {f"model.layers.{number}.{name}.weight": size for name, size in sizes.items()}


def _random(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return ones for a norm, and for a matrix values of a size to keep the outputs as large as the inputs."""
    return torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) / size[1] ** 0.5


def _peak_bytes(pid: int) -> int:
    """Read the largest resident memory a process has had, from /proc; 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    sys.exit(main())

"""A language model pruned from disk takes the memory of a block, not of the model: scripts/bigmodel.py, small."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is missing: pip install 'sparsify-torch[hf]'")

import bigmodel

SHAPE = bigmodel.Shape(hidden=384, inner=768, heads=4, kv_heads=2, vocabulary=1000)
N_BLOCKS = 15

FEW = """
import bigmodel

def data():
    return [{"input_ids": batch["input_ids"][:, :32]} for batch in list(bigmodel.data())[:1]]
"""

# Prunes two models, and prints by how much the peak of resident memory rose for the second.
PROGRAM = """
import sys
from pathlib import Path
import torch
import bigmodel
from sparsify.cli import main

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def compress(model):
    options = ["--method", "magnitude", "--sparsity", "0.5", "--include", "*.mlp.*", "--format", "csr", "--json"]
    where = ["--model", f"hf:{model}", "--data", "few:data", "--out", f"{model}.safetensors"]
    assert main(["compress", *where, *options, "--stream", "--cache", "0.001"]) == 0

torch.set_num_threads(1)
compress(sys.argv[1])
before = peak()
compress(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    bigmodel.write_model(small, 2, SHAPE)
    n_bytes = bigmodel.write_model(large, N_BLOCKS, SHAPE)
    (tmp_path / "few.py").write_text(FEW)
    scripts = Path(bigmodel.__file__).parent
    environment = {"PYTHONPATH": f"{tmp_path}:{scripts}:{scripts.parent}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(small), str(large)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rise = int(result.stdout.splitlines()[-1])
    assert n_bytes > 70_000_000
    assert rise < n_bytes / 3, f"{rise:,} bytes more for a model of {n_bytes:,}"

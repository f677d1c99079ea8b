"""Two processes that share the calibration data make the masks of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparsify
from sparsify.calibration.data_parallel import all_reduce_gram, local_batches
from sparsify.cli import main
from sparsify.masking.gram import Gram

if not torch.distributed.is_available():
    pytest.skip("torch has no torch.distributed here", allow_module_level=True)

MODULE = """
import os
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

def model():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return nn.Sequential(*(Block() for _ in range(3)))

def data():
    return [torch.randn(40, 24, generator=torch.Generator().manual_seed(i)) for i in range(5)]

def other_data():
    return [torch.full((40, 24), float(os.environ["RANK"]))]

def norm(model):
    return sum(float(model(x).norm()) for x in data())
"""

RUNS = {
    "in-memory": ["--method", "sparsegpt", "--sparsity", "0.5", "--eval", "ours:norm"],
    "from-disk": ["--method", "sparsegpt", "--sparsity", "0.5", "--stream", "--weights", "weights.safetensors"],
    "resumed": ["--method", "wanda", "--refit", "--sparsity", "0.6", "--resume", "--eval", "ours:norm"],
    "measured": ["--method", "alps", "--sparsity", "0.6", "--allocation", "error", "--recover", "0.1"],
}

# Compresses in all of these ways, one after the other; "resumed" is first interrupted in both processes. Then an error
# in the data of one process, which ends both: they would wait for each other.
PROGRAM = """
import json, os, sys
import ours
import sparsify, torch
from sparsify.offload import journal
from sparsify.cli import main
from sparsify.calibration.data_parallel import process_group

class Stopped(BaseException): pass

def stop(self, layers):
    write(self, layers)
    if "1.up" in layers:
        raise Stopped

write = journal.Journal.write
with process_group():
    for name, options in json.loads(sys.argv[1]).items():
        if name == "resumed":
            journal.Journal.write = stop
            try:
                main(options)
            except Stopped:
                journal.Journal.write = write
        print(f"{name} {main(options)}\\n", end="", flush=True)
    tuned = sparsify.prune(sparsify.convert(ours.model()), 0.6, method="wanda", data=ours.data(), reconstruct=2)
    print(f"tuned {sum(float(p.double().square().sum()) for p in tuned.parameters())!r}\\n", end="", flush=True)
    model, data = sparsify.convert(ours.model()), ours.data()
    data[1][0, 0] = torch.nan
    try:
        sparsify.prune(model, 0.6, method="wanda", data=data)
    except ValueError as error:
        print(f"{error}\\n", end="", flush=True)
if os.path.isdir("/proc/self/task"):
    threads = [open(f"/proc/self/task/{number}/comm").read() for number in os.listdir("/proc/self/task")]
    print("threads " + " ".join(threads).replace("\\n", " ") + "\\n", end="", flush=True)
"""


def options_of(name: str, out: str) -> list[str]:
    common = ["compress", "--model", "ours:model", "--data", "ours:data", "--format", "csr", "--json", "--out", out]
    return [*common, *RUNS[name]]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data, and the files that two processes of torchrun have made of it."""
    folder = tmp_path_factory.mktemp("ours")
    (folder / "ours.py").write_text(MODULE)
    (folder / "program.py").write_text(PROGRAM)
    weights: dict[str, object] = {}
    exec(MODULE, weights)
    save_file(weights["model"]().state_dict(), folder / "weights.safetensors")
    runs = {name: options_of(name, f"two-{name}.safetensors") for name in RUNS}
    runs["odd"] = [*runs["in-memory"], "--data", "ours:other_data"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py", json.dumps(runs)]
    paths = os.pathsep.join([str(folder), str(Path(sparsify.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "out.txt").write_text(done.stdout)
    (folder / "errors.txt").write_text(done.stderr)
    return folder


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", RUNS)
def test_compress_under_torchrun_writes_the_file_of_one_process(
    ours: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ours)
    monkeypatch.syspath_prepend(ours)
    assert main(options_of(name, f"one-{name}.safetensors")) == 0
    one, two = (load_file(f"{n}-{name}.safetensors") for n in ("one", "two"))
    assert list(one) == list(two)
    for key, tensor in one.items():
        if not tensor.is_floating_point():  # where the kept weights are
            assert torch.equal(two[key], tensor), key
        elif name != "measured":  # which recovers for a time
            torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5)
    out = (ours / "out.txt").read_text()
    assert out.count(f'"two-{name}.safetensors"') == 1  # one process tells
    assert out.count(f"{name} 0") == 2
    assert not list(ours.glob("*.partial"))


def test_data_that_differs_between_processes_is_refused(ours: Path) -> None:
    assert (ours / "out.txt").read_text().count("odd 2") == 2
    assert (ours / "errors.txt").read_text().count("not the same batches in every process") == 2


def test_tuned_blocks_are_the_same_in_both_processes(ours: Path) -> None:
    lines = [line for line in (ours / "out.txt").read_text().splitlines() if line.startswith("tuned ")]
    assert len(lines) == 2
    assert lines[0] == lines[1]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc on Linux alone")
def test_no_thread_of_the_group_outlives_it(ours: Path) -> None:
    """An interpreter that ends beside such a thread may abort the process: its work was done, its exit code says no."""
    lines = [line for line in (ours / "out.txt").read_text().splitlines() if line.startswith("threads ")]
    assert len(lines) == 2
    assert "gloo" not in "".join(lines)


def test_an_error_in_one_process_ends_both(ours: Path) -> None:
    out = (ours / "out.txt").read_text()
    assert "another process found its calibration data wrong" in out
    assert "0.up: its input in batch 0 of the calibration data holds NaN" in out


def test_without_a_group_all_is_as_it_was() -> None:
    gram = Gram(2)
    assert all_reduce_gram(gram) is gram
    assert local_batches([1, 2]) == [1, 2]
    with pytest.raises(ValueError, match="wrong"):
        all_reduce_gram(None, ValueError("wrong"))


def test_the_error_names_layer_and_batch() -> None:
    model = sparsify.convert(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="0: its input in batch 1 of the calibration data holds NaN"):
        sparsify.prune(model, 0.5, method="wanda", data=[torch.ones(2, 4), torch.full((2, 4), torch.nan)])

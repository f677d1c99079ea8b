"""A failure on the command line is one line and an exit code, and comes before the work if it can."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsify.cli import main
from sparsify.cli.models import load_weights
from sparsify.cli.parser import _budget

MODULE = """
import sys
import torch
from torch import nn

class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
    def forward(self, x):
        raise KeyError("nothing of this name")

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
def picky(): return Picky()
def batches(): return [torch.randn(32, 8)]
def narrow(): return [torch.randn(4, 7)]
def one(model): return 1.0
def missing(*_): return {}["first"]
def leaves(*_): sys.exit(0)
def hungry(*_): raise MemoryError
def deep(*_): return deep()
def several(*_): raise RuntimeError("the first line\\nthe second")
def silent(*_): raise type("Silent", (Exception,), {"__str__": lambda self: 1 / 0})
def number(): return 3
def half_way():
    yield torch.randn(32, 8)
    raise OSError("the disk has gone")
CONSTANT = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the present folder, which is on no path."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_odd.py").write_text("def f(:\n")
    (tmp_path / f"{name}_exit.py").write_text("import sys\nsys.exit('done')\n")
    monkeypatch.chdir(tmp_path)
    return name


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return call


def compress(mine: str, *options: object, model: str = "build") -> tuple[object, ...]:
    return ("compress", "--model", f"{mine}:{model}", "--sparsity", 0.5, "--out", "out", "--json", *options)


def data(mine: str, function: str) -> tuple[object, ...]:
    return ("--data", f"{mine}:{function}", "--method", "wanda")


#: What is wrong, the command, its exit code, and words of the one line.
FAILURES: dict[str, tuple[Callable[[str], tuple[object, ...]], int, str]] = {
    "a builder": (lambda m: compress(m, model="missing"), 2, "KeyError: 'first' (M.py, line 20)"),
    "a builder that exits": (lambda m: compress(m, model="leaves"), 2, ":leaves': SystemExit: 0 (M.py, line 21)"),
    "a builder without memory": (lambda m: compress(m, model="hungry"), 2, ":hungry': MemoryError (M.py"),
    "a builder without end": (lambda m: compress(m, model="deep"), 2, "RecursionError: maximum recursion depth"),
    "many lines": (lambda m: compress(m, model="several"), 2, "RuntimeError: the first line (M.py"),
    "an error without words": (lambda m: compress(m, model="silent"), 2, ":silent': Silent (M.py"),
    "no function": (lambda m: compress(m, model="CONSTANT"), 2, "there is no function 'CONSTANT' in 'M'"),
    "no module": (lambda m: ("bench", "--model", f"{m}.x:y"), 2, "importable from here"),
    "no syntax": (lambda m: ("bench", "--model", f"{m}_odd:y"), 2, "SyntaxError"),
    "a script": (lambda m: ("bench", "--model", f"{m}_exit:y"), 2, "SystemExit: done (M_exit.py, line 2)"),
    "data": (lambda m: compress(m, *data(m, "missing")), 2, "--data M:missing: KeyError: 'first'"),
    "data that are none": (lambda m: compress(m, *data(m, "number")), 2, "returned a int; return a list or generator"),
    "data that end": (lambda m: compress(m, *data(m, "half_way")), 5, "--data M:half_way: the disk has gone (M.py"),
    "data of another width": (
        lambda m: ("sensitivity", "--model", f"{m}:build", "--data", f"{m}:narrow"),
        2,
        "the model does not run on batch 0 of the calibration data: RuntimeError: mat1 and mat2",
    ),
    "evaluation": (lambda m: compress(m, "--eval", f"{m}:leaves"), 2, "--eval M:leaves: SystemExit: 0"),
    "evaluation, streaming": (
        lambda m: compress(m, *data(m, "batches"), "--stream", "--weights", "w.safetensors", "--eval", f"{m}:missing"),
        2,
        "--eval M:missing: KeyError: 'first'",
    ),
    "inputs": (lambda m: ("bench", "--model", f"{m}:build", "--inputs", f"{m}:missing"), 2, "--inputs M:missing: Key"),
    "forward": (
        lambda m: ("bench", "--model", f"{m}:picky", "--shape", "8"),
        2,
        "does not run on inputs of 1x8: KeyError: 'nothing of this name' (M.py, line 11)",
    ),
    "a shape without end": (
        lambda m: ("bench", "--model", f"{m}:build", "--shape", "9999999999999"),
        2,
        "ask for more than 268,435,456 values",
    ),
    "threads": (lambda m: ("bench", "--model", f"{m}:build", "--threads", 10**9), 2, "at most 1024, got 1000000000"),
    "tokens": (lambda m: compress(m, "--tokens", 10**12), 2, "--tokens must be at most 1048576"),
    "a cache without end": (lambda m: compress(m, *data(m, "batches"), "--cache", "inf"), 2, "of GB, got inf"),
    "a cache of 1e300": (lambda m: compress(m, *data(m, "batches"), "--cache", "1e300"), 2, "of GB, got 1e+300"),
}


def test_every_failure_is_one_line_and_an_exit_code(mine: str, run: Run) -> None:
    save_file(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).state_dict(), "w.safetensors")
    wrong = []
    for name, (command, code, words) in FAILURES.items():
        found, err = run(*command(mine))
        if found != code or words not in err.replace(mine, "M") or err.count("\n") != 1:
            wrong.append(f"{name}: exit {found}, not {code}: {err}")
    assert not wrong, "\n".join(wrong)
    assert not Path("out").exists()


def test_debug_shows_the_traceback_before_the_line(mine: str, run: Run) -> None:
    for arguments in (("--debug", *compress(mine, model="missing")), compress(mine, "--debug", model="missing")):
        code, err = run(*arguments)
        assert code == 2
        assert err.startswith("Traceback (most recent call last)")
        assert 'return {}["first"]' in err
        assert err.splitlines()[-1].startswith(f"sparsify: model '{mine}:missing': KeyError")


# Weights


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:Validating sparse")
def test_weights_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    state = nn.Linear(8, 8).state_dict()
    tensors = {
        "weight is int8 in the file and float32 in the model": torch.zeros(8, 8, dtype=torch.int8),
        "weight is complex64 in the file": torch.zeros(8, 8, dtype=torch.complex64),
        "weight is bool in the file": torch.zeros(8, 8, dtype=torch.bool),
        "weight is float8_e4m3fn in the file": torch.zeros(8, 8).to(torch.float8_e4m3fn),
        r"weight is \(8, 7\) in the file, \(8, 8\) in the model": torch.zeros(8, 7),
        "weight holds no plain values": torch.zeros(8, 8).to_sparse(),
        r"\(root\): the weight holds NaN": torch.full((8, 8), torch.nan),
    }
    for message, weight in tensors.items():
        model = nn.Linear(8, 8)
        before = model.weight.clone()
        torch.save({**state, "weight": weight}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=message):
            load_weights(model, tmp_path / "w.pt")
        assert torch.equal(model.weight, before)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        torch.save({key: value.to(dtype) for key, value in state.items()}, tmp_path / "w.pt")
        load_weights(model, tmp_path / "w.pt")
        assert torch.equal(model.weight, state["weight"].to(dtype).float())


def test_weights_in_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(nn.Linear(8, 8).state_dict(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for n in range(0, len(whole), 7):  # KeyError, IndexError, UnicodeDecodeError and others
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"w\.pt"):
            load_weights(nn.Linear(8, 8), path)
    torch.save({1: torch.ones(2)}, path)
    with pytest.raises(ValueError, match="its key 1 is no name"):
        load_weights(nn.Linear(8, 8), path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("w/data/0", bytes(10**6))
    with pytest.raises(ValueError, match="bytes that unpacks to 1000000"):
        load_weights(nn.Linear(8, 8), path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("0.bias", torch.zeros(16, dtype=torch.int8), "0.bias is int8 in the file and float32 in the model"),
        ("2.weight", torch.full((4, 16), torch.nan), "2: the weight holds NaN"),
    ],
)
def test_streamed_weights_of_another_kind_are_refused_by_name(
    mine: str, run: Run, name: str, tensor: torch.Tensor, message: str
) -> None:
    state = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).state_dict()
    save_file({**state, name: tensor}, "w.safetensors")
    code, err = run(*compress(mine, *data(mine, "batches"), "--stream", "--weights", "w.safetensors"))
    assert code == 2
    assert message in err


# Model folders


def test_no_code_of_a_model_folder_runs_or_is_offered_to_run(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="transformers is missing: pip install 'sparsify-torch[hf]'")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (tmp_path / "c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    mapped = {"model_type": "evil", "auto_map": {"AutoConfig": "c.C", "AutoModel": "c.C"}}
    for config, words in (
        (mapped, "'auto_map' names Python code in the folder, and no such code is run"),
        ({"model_type": "bert", "text_config": {"auto_map": {}}}, "'auto_map' names Python code"),
        ({"model_type": "bert", "attn_implementation": "some/kernel"}, "names code to download, 'some/kernel'"),
        ({"model_type": "evil"}, "config.json: ValueError"),
        ({"model_type": []}, "config.json: "),
        (["bert"], "config.json: "),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        code, err = run("inspect", f"hf:{tmp_path}")
        assert (code, err.count("\n")) == (2, 1), err
        assert words in err
    for architectures in (["pipeline"], [3], "BertModel", 3):  # the model is known, and its weights are missing
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": architectures}))
        code, err = run("inspect", f"hf:{tmp_path}")
        assert code in (2, 5)
        assert err.startswith("sparsify: hf:")
    assert not (tmp_path / "ran").exists()


def test_inspect_imports_nothing_from_the_present_folder_unasked(mine: str, run: Run) -> None:
    code, err = run("inspect", f"{mine}:build")
    assert code == 2
    assert f"nothing is imported from this folder here; write --model {mine}:build" in err
    assert mine not in sys.modules
    for name in (f"{mine}:build", f"./{mine}:build"):  # a file
        Path(name).write_text("no checkpoint")
        assert run("inspect", name)[0] == 4
    assert mine not in sys.modules
    assert run("inspect", "./nothing:here")[0] == 5
    assert run("inspect", "--model", f"{mine}:build")[0] == 0
    assert run("inspect", "--model", f"{mine}:build", "--run", "--shape", "8")[0] == 0
    assert "give either a file or a model" in run("inspect")[1]
    assert "give either a file or a model" in run("inspect", "a", "--model", "b:c")[1]


# Outputs


def test_no_output_replaces_what_the_command_reads(mine: str, run: Run) -> None:
    save_file(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).state_dict(), "w.safetensors")
    Path("recipe.yaml").write_text("groups:\n  - {sparsity: 0.5}\n")
    os.link("w.safetensors", "hard")
    os.symlink("w.safetensors", "soft")
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    weights = ("--weights", "w.safetensors")
    model = ("--model", f"{mine}:build")
    measured = ("sensitivity", *model, *weights, "--data", f"{mine}:batches", "--target", 0.5)
    for arguments in (
        *(compress(mine, *weights, "--out", out) for out in ("w.safetensors", "./w.safetensors", "hard", "soft")),
        compress(mine, *weights, *data(mine, "batches"), "--stream", "--out", "w.safetensors"),
        compress(mine, "--out", f"{mine}.py"),
        ("compress", *model, "--recipe", "recipe.yaml", "--out", "recipe.yaml"),
        (*measured, "--recipe", "w.safetensors"),
        (*measured, "--recipe", f"{mine}.py"),
    ):
        code, err = run(*arguments)
        assert code == 2, err
        assert "which it would replace; name another file" in err
    assert {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_what_could_only_fail_after_the_work_is_refused_before(
    mine: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    monkeypatch.setattr("sparsify.cli.sensitivity.measure_sensitivity", work)
    monkeypatch.setattr("sparsify.apply", work)
    measured = ("sensitivity", "--model", f"{mine}:build", "--data", f"{mine}:batches", "--json")
    has_matplotlib = find_spec("matplotlib") is not None
    picture = "its name must end in one of" if has_matplotlib else "matplotlib is not installed"
    for arguments, words in (
        (compress(mine, *data(mine, "batches"), "--out", "/proc/x"), "no file can be written in /proc"),
        (compress(mine, "--recipe", "none.yaml"), "--sparsity has no effect beside --recipe"),
        ((*measured, "--target", 0.5, "--recipe", "/nope/r.yaml"), "there is no folder /nope"),
        ((*measured, "--picture", "p.xyz"), picture),
        ((*measured, "--target", 0.99, "--recipe", "r.yaml"), "leaves no room for sparsity 0.99"),
        ((*measured, "--method", "magnitud"), "method 'magnitud' is none of: magnitude, random"),
        ((*measured, "--method", "movement"), "method 'movement'"),
        ((*measured, "--sparsities", "0.9,0.5"), "must rise between 0 and 1"),
        ((*measured, "--sparsities", "nan"), "must rise between 0 and 1"),
    ):
        code, err = run(*arguments)
        assert code in (2, 5), err
        assert words in err
        assert not Path("r.yaml").exists()
    free = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    code, err = run(*compress(mine, *data(mine, "batches")))
    assert code == 5
    assert "are needed there" in err


@pytest.mark.parametrize("text", ["inf", "1e400", "-inf", "nan", "0", "infsteps", "9" * 5000 + "steps"])
def test_a_budget_is_finite(text: str) -> None:
    with pytest.raises(Exception, match="is no budget"):
        _budget(text)


# As a program


def test_the_installed_program(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(MODULE)
    program = Path(sys.executable).with_name("sparsify")
    command: list[object] = [program] if program.exists() else [sys.executable, "-m", "sparsify"]

    def shell(text: str) -> subprocess.CompletedProcess[str]:
        line = text.replace("sparsify", " ".join(map(str, command)))
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # without kernels the import says so
        return subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=quiet, check=False
        )

    done = shell("sparsify compress --model my:build --data my:batches --method wanda --sparsity .5 --out out --json")
    assert done.returncode == 0, done.stderr
    gone = shell("set -o pipefail; { sparsify schema; } | true")
    assert (gone.returncode, gone.stderr) == (141, "")
    full = shell("sparsify schema > /dev/full")
    assert (full.returncode, full.stderr) == (5, "sparsify: [Errno 28] No space left on device\n")

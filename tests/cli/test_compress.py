"""The commands that look at data, from the command line: evaluation, recovery, streaming, resuming, sensitivity."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sparsify
from sparsify.cli import main
from sparsify.offload.journal import Journal

MODULE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

def model():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(3)))

def data():
    return [torch.randn(30, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]

def other():
    return [2 * x for x in data()]

def far():
    return [x / 10 for x in data()]

def norm(model):
    return {"norm": sum(float(model(x).norm()) for x in data())}

def text(model):
    return "good"

def peek(model):
    return float(model[1].up.weight.norm())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of a model, data and an evaluation, and the model's weights."""
    name = f"user_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    save_file(runpy.run_path(f"{name}.py")["model"]().state_dict(), tmp_path / "weights.safetensors")
    return Path(name)


def compress(here: Path, *options: str) -> int:
    common = ["--model", f"{here}:model", "--data", f"{here}:data", "--format", "csr", "--json"]
    return main(["compress", *common, *options])


def test_eval_reports_quality_before_and_after(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress(here, "--sparsity", "0.9", "--out", "a.safetensors", "--eval", f"{here}:norm") == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    module = __import__(str(here))
    with torch.no_grad():
        assert quality["dense"] == pytest.approx(module.norm(module.model()), rel=1e-4)
        loaded = sparsify.load("a.safetensors", module.model())
        assert quality["sparse"] == pytest.approx(module.norm(loaded), rel=1e-4)
    assert compress(here, "--sparsity", "0.9", "--out", "a.safetensors", "--eval", f"{here}:text") == 2
    assert "must return a number or a dict of numbers, got 'good'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [["--stream", "--weights", "weights.safetensors"], ["--resume"]])
def test_eval_of_a_run_that_can_be_resumed(
    here: Path, kind: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--sparsity", "0.8", "--method", "sparsegpt", "--eval", f"{here}:norm"]
    assert compress(here, *options, "--out", "a.safetensors") == 0
    expected = json.loads(capsys.readouterr().out)["quality"]
    n_finished = 0

    def stop_after_two(self: Journal, layers: dict[str, Any]) -> None:
        nonlocal n_finished
        write(self, layers)
        n_finished += 1
        if n_finished == 2:
            raise KeyboardInterrupt

    write = Journal.write
    monkeypatch.setattr(Journal, "write", stop_after_two)
    assert compress(here, *options, *kind, "--out", "b.safetensors") == 130
    monkeypatch.setattr(Journal, "write", write)
    capsys.readouterr()
    again = kind if "--resume" in kind else [*kind, "--resume"]
    assert compress(here, *options, *again, "--out", "b.safetensors") == 0
    quality = json.loads(capsys.readouterr().out)["quality"]  # dense is the whole dense model, though layers are done
    assert quality["dense"] == pytest.approx(expected["dense"], rel=1e-6)
    assert quality["sparse"] == pytest.approx(expected["sparse"], rel=1e-4)
    assert quality["sparse"] != pytest.approx(expected["dense"], rel=1e-3)


def test_eval_that_reads_a_weight_which_is_on_disk(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = ["--stream", "--weights", "weights.safetensors", "--eval", f"{here}:peek"]
    assert compress(here, "--sparsity", "0.5", "--out", "a.safetensors", *stream) == 2
    assert "--eval: 'quality' is NaN. With --stream a weight is in memory only" in capsys.readouterr().err


def test_recover_in_a_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "version: 1\ngroups:\n  - {method: wanda, sparsity: 0.8}\n"
    errors = {}
    for name, stage in (("plain", ""), ("recovered", "recover: {steps: 100}\n")):
        Path(f"{name}.yaml").write_text(recipe + stage)
        assert compress(here, "--recipe", f"{name}.yaml", "--out", f"{name}.safetensors") == 0
        module = __import__(str(here))
        loaded, dense = sparsify.load(f"{name}.safetensors", module.model()), module.model()
        with torch.no_grad():
            errors[name] = sum(float((loaded(x) - dense(x)).square().sum()) for x in module.data())
    assert errors["recovered"] < 0.7 * errors["plain"]
    by_option = ["--method", "wanda", "--sparsity", "0.8", "--recover", "100steps"]
    assert compress(here, *by_option, "--out", "option.safetensors") == 0
    assert Path("option.safetensors").read_bytes() == Path("recovered.safetensors").read_bytes()
    for odd in ("3 epochs", "0steps", "-1", "1.5steps", "nan"):
        with pytest.raises(SystemExit):
            compress(here, "--sparsity", "0.5", f"--recover={odd}", "--out", "x.safetensors")
        assert f"'{odd}' is no budget; write 240 (seconds) or 200steps" in capsys.readouterr().err
    Path("wrong.yaml").write_text(recipe + "recover: {stepps: 100}\n")
    assert compress(here, "--recipe", "wrong.yaml", "--out", "x.safetensors") == 3
    assert "stepps" in capsys.readouterr().err


@pytest.mark.filterwarnings("always::sparsify.CarryOverWarning")
def test_several_sources_a_reconstruction_and_other_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruning = ["--method", "wanda", "--sparsity", "0.8", "--reconstruct", "20"]
    sources = ["--data", f"{here}:data", f"{here}:other", "--samples", "120"]
    assert compress(here, *pruning, *sources, "--check", f"{here}:far", "--out", "a.safetensors") == 0
    printed = capsys.readouterr()
    assert f"on --check {here}:far; add data of that kind" in printed.err
    quality = json.loads(printed.out)["quality"]["sparse"]
    inside, outside = "cosine to the dense outputs, on --data", f"cosine to the dense outputs, on --check {here}:far"
    assert quality[outside] < quality[inside] < 1
    Path("mine.yaml").write_text("groups: [{method: wanda, sparsity: 0.8}]\nreconstruct: {epochs: 20}\n")
    assert compress(here, "--recipe", "mine.yaml", *sources, "--out", "b.safetensors") == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    capsys.readouterr()
    for options, message in (
        ([*pruning[:-1], "0"], "--reconstruct: Input should be greater than 0"),
        (["--recipe", "mine.yaml", "--reconstruct", "1"], "--reconstruct has no effect beside --recipe"),
        (
            ["--sparsity", "0.5", "--check", f"{here}:far", "--resume"],
            "--check compares with the dense model in memory",
        ),
        (["--sparsity", "0.5", "--data", f"{here}:data", f"{here}:data"], "the same source twice"),
        (
            ["--sparsity", "0.5", "--data", f"{here}:data", f"{here}:far", "--samples", "1"],
            "--samples 1: less than one",
        ),
        (["--sparsity", "0.5", "--check", f"{here}:nothing"], "--check"),
    ):
        assert compress(here, *options, "--out", "x.safetensors") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("stream", [["--stream", "--weights", "weights.safetensors"], []])
def test_interrupted_and_resumed(
    here: Path, stream: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--sparsity", "0.5", "--method", "sparsegpt", "--resume", *stream]
    assert compress(here, *options, "--out", "whole.safetensors") == 0
    write, n_written = Journal.write, 0

    def stopping(self: Journal, layers: dict[str, Any]) -> None:
        nonlocal n_written
        if n_written == 3:
            raise KeyboardInterrupt
        n_written += 1
        write(self, layers)

    monkeypatch.setattr(Journal, "write", stopping)
    assert compress(here, *options, "--out", "out.safetensors") == 130
    assert capsys.readouterr().err.endswith("sparsify: interrupted\n")
    monkeypatch.setattr(Journal, "write", write)
    capsys.readouterr()
    other = ["0.6" if option == "0.5" else option for option in options]
    assert compress(here, *other, "--out", "out.safetensors") != 0
    assert "another recipe" in capsys.readouterr().err
    if stream:
        assert compress(here, *(o for o in options if o != "--resume"), "--out", "out.safetensors") == 2
        assert "go on with --resume, or delete it" in capsys.readouterr().err
    assert compress(here, *options, "--out", "out.safetensors") == 0
    assert Path("out.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    assert not list(Path().glob("*.partial"))


def test_what_does_not_go_together_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--cache", "-1"], "--cache is a number of GB, got -1"),
        (["--stream"], "give the weights of"),
        (["--stream", "--recover", "1"], "cannot --stream"),
        (["--format", "csr", "--tokens", "5"], "tokens=5 has no effect with format 'csr'"),
    ):
        assert compress(here, "--sparsity", "0.5", "--out", "x.safetensors", *options) == 2
        assert message in capsys.readouterr().err


def test_sensitivity_writes_a_recipe_that_meets_the_budget(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", f"{here}:model", "--data", f"{here}:data", "--method", "wanda", "--sparsities", "0.5,0.9"]
    budget = ["--target", "0.7", "--recipe", "found.yaml"]
    assert main(["sensitivity", *options, *budget]) == 0
    assert "0.down" in capsys.readouterr().out
    assert compress(here, "--recipe", "found.yaml", "--out", "x.safetensors") == 0
    assert json.loads(capsys.readouterr().out)["in_file"][-1]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert main(["sensitivity", *options, *budget, "--pattern", "1x4"]) == 0
    assert compress(here, "--recipe", "found.yaml", "--out", "x.safetensors") == 0
    weight = sparsify.to_dense(sparsify.load("x.safetensors", __import__(str(here)).model()))[0].up.weight
    assert set((weight.view(32, 4, 4) != 0).sum(2).unique().tolist()) == {0, 4}
    capsys.readouterr()
    assert main(["sensitivity", *options, "--target", "0.7"]) == 2
    assert "go together" in capsys.readouterr().err


TIED = """
import torch
from torch import nn
import torch.nn.functional as F

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight
        self.own = nn.Parameter(torch.randn(16, 16))
    def forward(self, ids):
        return self.head(F.linear(torch.relu(self.inner(self.embed(ids))), self.own))

def model():
    torch.manual_seed(0)
    return Tied()

def ids():
    return [torch.arange(24).reshape(4, 6)]

def arguments():
    return (torch.arange(24).reshape(4, 6),)
"""


@pytest.mark.parametrize("way", ["skip", "share"])
def test_what_to_do_with_tied_weights_and_with_multiplications_in_code_can_be_said(
    here: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    name = f"{here}_tied"
    Path(f"{name}.py").write_text(TIED)
    common = ["compress", "--model", f"{name}:model", "--sparsity", "0.5", "--format", "csr", "--json"]
    assert main([*common, "--out", "no.safetensors"]) == 2
    assert f"tied={way!r}" in capsys.readouterr().err
    assert main([*common, "--out", "tied.safetensors", "--tied", way, "--functional"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["in_memory"]}
    assert found["inner"]["format"] == found["own_layer"]["format"] == "csr"
    assert (found["head"]["format"] == "dense") == (way == "skip")
    fresh = __import__(name).model()
    loaded = sparsify.load("tied.safetensors", fresh)
    assert loaded(__import__(name).ids()[0]).shape == (4, 6, 24)
    options = ["--tied", way, "--json"]
    bench = ["bench", "--model", f"{name}:model", "--inputs", f"{name}:arguments", "--functional"]
    assert main([*bench, *options]) == 0
    assert json.loads(capsys.readouterr().out)["speedup"] > 0
    assert main(["sensitivity", "--model", f"{name}:model", "--data", f"{name}:ids", *options]) == 0
    assert set(json.loads(capsys.readouterr().out)["damage"]) == ({"inner"} if way == "skip" else {"inner", "head"})


@pytest.mark.parametrize("kind", [[], ["--resume"], ["--stream", "--weights", "weights.safetensors"]])
@pytest.mark.parametrize("by_recipe", [False, True])
def test_quantize_writes_int8(
    here: Path, kind: list[str], by_recipe: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--sparsity", "0.5", "--method", "sparsegpt", "--quantize", "int8"]
    if by_recipe:
        (tmp_path / "recipe.yaml").write_text("quantize: int8\ngroups:\n  - {sparsity: 0.5, method: sparsegpt}\n")
        options = ["--recipe", "recipe.yaml"]
    assert compress(here, *options, *kind, "--out", "int8.safetensors") == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["numbers"] for row in result["in_file"][:-1]} == {"int8 weights"}
    judged = result["in_file" if "--stream" in kind else "in_memory"][:-1]
    assert all(0 < row["int8_error"] < 0.05 for row in judged)
    loaded = sparsify.load("int8.safetensors", __import__(str(here)).model())
    assert loaded[0].up.values.dtype == torch.int8


def test_quantize_without_effect_is_refused(here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("quantize: int8\ngroups:\n  - {sparsity: 0.5}\n")
    for options, message in (
        (["--sparsity", "0.5", "--quantize-rest"], "--quantize-rest has no effect without --quantize"),
        (["--recipe", "recipe.yaml", "--quantize", "int8-weights"], "the recipe says 'int8'; leave one of them out"),
        (
            ["--sparsity", "0.5", "--method", "wanda", "--stream", "--quantize", "int8", "--quantize-rest"],
            "--quantize-rest needs the model in memory",
        ),
        (["--sparsity", "0.5", "--format", "dense", "--quantize", "int8"], "no effect with format 'dense'"),
    ):
        assert compress(here, *options, "--out", "a.safetensors") == 2
        assert message in capsys.readouterr().err
        assert not Path("a.safetensors").exists()

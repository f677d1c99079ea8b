"""The command line: exit codes, JSON, messages; and the models that it builds."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear
from sparsify.cli import main
from sparsify.cli.models import build_model, load_weights

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
NET = "test_cli:net"


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def net() -> Net:
    return Net()


def other() -> Net:
    return Net(seed=5)


def with_attention() -> nn.Module:
    """One that convert does not know."""
    return nn.Sequential(nn.Linear(8, 8), type("OwnAttention", (nn.MultiheadAttention,), {})(8, 2))


def no_module() -> int:
    return 3


class Done:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> "object":
    def call(*arguments: object) -> Done:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(code, captured.out, captured.err)

    return call


# compress


def test_compress_writes_a_file_that_loads(run, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = run(
        "compress", "--model", NET, "--recipe", RECIPES / "magnitude-50.yaml", "--set", "sparsity=0.75",
        "--format", "csr", "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    loaded = sparsify.load(out, other())
    wanted = sparsify.export(sparsify.prune(sparsify.convert(net()), 0.75), format="csr")
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), wanted(x))
    assert isinstance(loaded.first, CSRLinear)
    for text in ("first", "32x16", "0.7500", str(out), "    sparsify inspect"):
        assert text in done.out


def test_compress_with_options_alone(run, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    options = (
        "--sparsity",
        0.5,
        "--method",
        "random",
        "--seed",
        3,
        "--pattern",
        "4x1",
        "--include",
        "*",
        "--exclude",
        "first",
    )
    assert run("compress", "--model", NET, *options, "--out", out).code == 0
    assert [(row.name, row.sparsity) for row in sparsify.inspect(out)] == [("second", 0.5)]


def test_compress_json(run, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = run("compress", "--model", NET, "--sparsity", 0.75, "--out", out, "--json")
    assert done.code == 0
    assert done.err == ""  # no progress bar
    assert done.json["file_bytes"] == out.stat().st_size
    assert [row["name"] for row in done.json["in_file"]] == ["first", "second", "total"]
    assert done.json["in_memory"][0]["sparsity"] == 0.75
    keys = {"name", "shape", "sparsity", "format", "n_bytes", "dense_bytes", "reason", "times_us", "error", "time_s"}
    keys |= {"numbers", "int8_error"}
    assert set(done.json["in_file"][0]) == set(done.json["in_memory"][0]) == keys
    assert "dense" in done.json["in_memory"][0]["times_us"]


def test_compress_says_what_stays_dense(run, tmp_path: Path) -> None:
    done = run(
        "compress", "--model", "test_cli:with_attention", "--sparsity", 0.5, "--out", tmp_path / "out.safetensors"
    )
    assert done.code == 0
    assert "it is a OwnAttention, a subclass of nn.MultiheadAttention" in done.err


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin"])
def test_compress_takes_weights(run, tmp_path: Path, suffix: str) -> None:
    weights, out = tmp_path / f"weights.{suffix}", tmp_path / "out.safetensors"
    state = other().state_dict()
    if suffix == "safetensors":
        safetensors.torch.save_file(state, weights)
    else:
        torch.save({"state_dict": state} if suffix == "pth" else state, weights)
    assert run("compress", "--model", NET, "--weights", weights, "--sparsity", 0.0, "--out", out).code == 0
    loaded, x = sparsify.load(out, net()), torch.randn(3, 16)
    assert torch.equal(loaded(x), other()(x))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_does_not_run(run, tmp_path: Path) -> None:
    torch.save({"first.weight": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    done = run(
        "compress", "--model", NET, "--weights", tmp_path / "evil.pt", "--sparsity", 0.5, "--out", tmp_path / "o"
    )
    assert done.code == 2
    assert "evil.pt" in done.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "o").exists()


#: Arguments, exit code, words of the message; `wrong_files` has the files.
MISTAKES: dict[str, tuple[str, int, str]] = {
    "no command": ("", 2, "COMMAND"),
    "no model": ("compress {half} {out}", 2, "--model"),
    "no out": ("compress {net} {half}", 2, "--out"),
    "nothing to do": ("compress {net} {out}", 2, "--recipe FILE or --sparsity"),
    "sparsity above 1": ("compress {net} {out} --sparsity 2", 2, "between 0 and 1, got 2.0"),
    "no number": ("compress {net} {out} --sparsity x", 2, "--sparsity"),
    "unknown method": ("compress {net} {half} {out} --method magnitud", 2, "did you mean 'magnitude'?"),
    "unknown pattern": ("compress {net} {half} {out} --pattern 4x", 2, "4x1"),
    "unknown allocation": ("compress {net} {half} {out} --allocation globl", 2, "'global'?"),
    "unused seed": ("compress {net} {half} {out} --seed 3", 2, "no effect"),
    "unknown layer": ("compress {net} {half} {out} --include frist", 2, "'first'"),
    "options beside a recipe": ("compress {net} {half} {out} --recipe {magnitude}", 2, "--sparsity has no effect"),
    "set without a recipe": ("compress {net} {half} {out} --set a=1", 2, "--set has no effect"),
    "set without a value": ("plan {magnitude} {net} --set sparsity", 2, "NAME=VALUE"),
    "set of no YAML": ("plan {magnitude} {net} --set sparsity=[", 2, "--set"),
    "model of no form": ("compress {half} {out} --model net", 2, "package.module:builder"),
    "model in no module": ("compress {half} {out} --model nowhere:net", 2, "nowhere"),
    "model of no name": ("compress {half} {out} --model test_cli:nothing", 2, "nothing"),
    "model that is none": ("compress {half} {out} --model test_cli:no_module", 2, "not a torch.nn.Module"),
    "torchvision has it not": (
        "compress {half} {out} --model torchvision:resnet5",
        2,
        "did you mean 'resnet50'?" if find_spec("torchvision") else "torchvision is not installed",
    ),
    "hf without a folder": ("compress {half} {out} --model hf:{folder}", 2, "config.json"),
    "weights cut": ("compress {net} {half} {out} --weights {folder}/short.pt", 2, "short.pt"),
    "weights of text": ("compress {net} {half} {out} --weights {folder}/text.safetensors", 2, "text.safe"),
    "weights in a list": ("compress {net} {half} {out} --weights {folder}/list.pt", 2, "not a state_dict"),
    "weights of another": ("compress {net} {half} {out} --weights {folder}/other.pt", 2, "not for this model"),
    "weights of another shape": ("compress {net} {half} {out} --weights {folder}/shape.pt", 2, "first.weight"),
    "weights of NaN": ("compress {net} {half} {out} --weights {folder}/nan.pt", 2, "first: the weight holds NaN"),
    "weights of another suffix": ("compress {net} {half} {out} --weights {magnitude}", 2, ".safetensors, .pt"),
    "weights missing": ("compress {net} {half} {out} --weights nowhere.pt", 5, "nowhere.pt"),
    "recipe missing": ("compress {net} {out} --recipe nowhere.yaml", 5, "nowhere.yaml"),
    "recipe wrong": ("compress {net} {out} --recipe {folder}/bad.yaml", 3, "bad.yaml, line 2"),
    "unknown variable": ("plan {magnitude} {net} --set sparsty=1", 3, "did you mean 'sparsity'?"),
    "recipe does not fit": ("plan {magnitude} {net} --set layers=[frist]", 3, "magnitude-50.yaml: groups.0: 'frist'"),
    "recipe needs training": ("compress {net} {out} --recipe {gradual}", 3, "gradual-magnitude-90.yaml: groups.0"),
    "no folder": ("compress {net} {half} --out {folder}/nowhere/x", 5, "no folder"),
    "out is a folder": ("compress {net} {half} --out {folder}", 5, "folder"),
    "inspect nothing": ("inspect {folder}/nothing", 5, "nothing"),
    "inspect a cut file": ("inspect {folder}/cut.safetensors", 4, "not a whole safetensors file"),
    "inspect text": ("inspect {folder}/text.safetensors", 4, "text.safetensors"),
}


def wrong_files(folder: Path) -> None:
    """Write the files of MISTAKES."""
    (folder / "short.pt").write_bytes(b"PK\x03\x04")
    (folder / "text.safetensors").write_text("hello")
    (folder / "bad.yaml").write_text("groups:\n  - sparsity: 5\n")
    torch.save([1, 2], folder / "list.pt")
    torch.save(nn.Linear(3, 3).state_dict(), folder / "other.pt")
    torch.save(Net().state_dict() | {"first.weight": torch.zeros(3, 3)}, folder / "shape.pt")
    torch.save(Net().state_dict() | {"first.weight": torch.full((32, 16), torch.nan)}, folder / "nan.pt")
    checkpoint = folder / "cut.safetensors"
    sparsify.save(sparsify.prune(sparsify.convert(Net()), 0.5), checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])


def test_mistakes_have_an_exit_code_and_one_sentence(run, tmp_path: Path) -> None:
    wrong_files(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    parts = {
        "net": f"--model {NET}",
        "half": "--sparsity 0.5",
        "out": f"--out {tmp_path}/out.safetensors",
        "magnitude": RECIPES / "magnitude-50.yaml",
        "gradual": RECIPES / "gradual-magnitude-90.yaml",
        "folder": tmp_path,
    }
    wrong = []
    for name, (line, code, words) in MISTAKES.items():
        done = run(*line.format(**parts).split())
        if done.code != code or words not in done.err or "sparsify" not in done.err or "pydantic" in done.err:
            wrong.append(f"{name}: exit {done.code}, not {code}; {done.err[-300:]}")
        assert done.out == "", name
    assert not wrong, "\n".join(wrong)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(MISTAKES) > 35


# inspect, plan, schema


def test_inspect(run, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    sparsify.save(sparsify.export(sparsify.prune(sparsify.convert(net()), 0.75)), path)
    done = run("inspect", path)
    assert done.code == 0
    for text in ("first", "second", "bitmask", "0.7500", f"{path.stat().st_size:,} bytes"):
        assert text in done.out
    found = run("inspect", path, "--json").json
    assert found["file_bytes"] == path.stat().st_size
    assert [row["format"] for row in found["in_file"]] == ["bitmask", "bitmask", ""]


def test_plan_shows_each_update_and_writes_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("plan", RECIPES / "gradual-magnitude-90.yaml", "--model", NET, "--set", "end=2", "--set", "every=1")
    assert done.code == 0
    for text in ("groups.0", "first", "32x16", "epochs 0", "epochs 1", "epochs 2", "2 layers"):
        assert text in done.out
    done = run("plan", RECIPES / "gradual-magnitude-90.yaml", "--model", NET, "--json")
    layer = done.json["layers"][0]
    assert layer["targets"][0] == [0.0, 0.0]
    assert layer["targets"][-1] == [6.0, pytest.approx(0.9, abs=1e-2)]
    assert done.json["dense_bytes"] == 4 * (512 + 128)
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_ranked_group_says_that_parts_move(run) -> None:
    done = run("plan", RECIPES / "global-magnitude-80.yaml", "--model", NET)
    assert done.code == 0
    assert "~" in done.out


def test_values_of_set_are_what_they_are_in_a_recipe(run) -> None:
    done = run(
        "plan", RECIPES / "nm-2-4.yaml", "--model", NET, "--set", "pattern=1:4", "--set", "layers=[first]", "--json"
    )
    assert done.code == 0, done.err
    assert [(x["name"], x["targets"]) for x in done.json["layers"]] == [("first", [[0.0, 0.75]])]


def test_schema_accepts_our_recipes_and_refuses_a_wrong_key(run) -> None:
    schema = run("schema").json
    assert schema["title"] == "Recipe"
    assert {"groups", "vars", "version", "description"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is missing")
    yaml = pytest.importorskip("yaml")
    jsonschema.validate({"groups": [{"sparsity": 0.5}]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"groups": [{"sparsty": 0.5}]}, schema)
    for path in RECIPES.glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)


# As programs


def program(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)


MODULE = "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(16, 8))\n"


def test_the_script_and_the_module_are_the_same_program(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    arguments = ("--model", "mine:net", "--sparsity", 0.5, "--json", "--out", "out.safetensors")
    script = program(ROOT / "scripts" / "compress.py", *arguments, cwd=tmp_path)
    assert script.returncode == 0, script.stderr
    size = (tmp_path / "out.safetensors").stat().st_size
    module = program("-m", "sparsify", "inspect", "out.safetensors", "--json", cwd=tmp_path)
    assert module.returncode == 0, module.stderr
    assert json.loads(module.stdout)["file_bytes"] == json.loads(script.stdout)["file_bytes"] == size
    assert program("-m", "sparsify", "inspect", "mine.py", cwd=tmp_path).returncode == 4


# models.py


def test_build_model_gives_eval_mode() -> None:
    assert isinstance(build_model(NET), Net)
    assert not build_model(NET).training


def test_build_model_of_torchvision() -> None:
    pytest.importorskip("torchvision", reason="torchvision is missing")
    model = build_model("torchvision:mobilenet_v3_small")
    assert type(model).__name__ == "MobileNetV3"
    assert not model.training


def test_load_weights_of_a_tied_model(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    model, fresh = tied(), tied()
    safetensors.torch.save_file({"0.weight": model[0].weight.detach()}, tmp_path / "w.safetensors")  # stored once
    load_weights(fresh, tmp_path / "w.safetensors")
    assert torch.equal(fresh[1].weight, model[0].weight)
    with pytest.raises(ValueError, match="1 tensors are missing"):
        load_weights(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)), tmp_path / "w.safetensors")

"""A run of `compress --resume` that is stopped at any moment goes on with the same inputs, and with no others."""

import json
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsify
from sparsify.cli import main
from sparsify.offload.journal import Journal

MODULE = """
import torch
from torch import nn

class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Doubled(), nn.Linear(8, 8))

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 8))

def data():
    return [torch.randn(30, 8, generator=torch.Generator().manual_seed(1))]

def other_data():
    return [torch.randn(30, 8, generator=torch.Generator().manual_seed(2))]
"""

STREAM = ["--stream", "--weights", "weights.safetensors"]


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a module of models and data, and the weights of one of them."""
    name = f"user_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    save_file(runpy.run_path(f"{name}.py")["model"]().state_dict(), "weights.safetensors")
    return name


def compress(here: str, out: str, *options: str, model: str = "model", data: str = "data") -> int:
    where = ["--model", f"{here}:{model}", "--data", f"{here}:{data}", "--out", out, "--resume", "--json"]
    return main(["compress", *where, "--method", "sparsegpt", "--sparsity", "0.5", "--format", "csr", *options])


def stop_after(n_layers: int, run: Callable[[], object]) -> None:
    """Run until so many layers are finished."""
    with pytest.MonkeyPatch.context() as patch:
        write = Journal.write
        n_written = 0

        def stopping(self: Journal, layers: dict[str, Any]) -> None:
            nonlocal n_written
            write(self, layers)
            n_written += 1
            if n_written == n_layers:
                raise Killed

        patch.setattr(Journal, "write", stopping)
        with pytest.raises(Killed):
            run()


CALLS = ("mkdir", "replace", "unlink", "rmdir", "write", "fsync", "ftruncate")


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], bool]:
    """Run until the n-th call that changes a file, return whether it came to that; later calls do nothing either."""
    left = -1
    dead = False

    def stopping(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left, dead
            dead = dead or left == 0
            left -= 1
            if dead:
                raise Killed
            return real(*arguments, **options)

        return call

    def run(n: int, what: Callable[[], object]) -> bool:
        nonlocal left, dead
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, stopping(getattr(os, name)))
            left, dead = n, False
            try:
                what()
            except Killed:
                return True
            return False

    return run


@pytest.mark.filterwarnings("ignore:.*only the end of the clean-up was missing")
def test_killed_at_any_moment_it_goes_on(
    here: str, killed: Callable[..., bool], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(here, "whole") == 0
    whole, told = Path("whole").read_bytes(), json.loads(capsys.readouterr().out)
    n = 0
    while killed(n, lambda: compress(here, "out")):
        capsys.readouterr()
        assert compress(here, "out") == 0, f"after {n} calls: {capsys.readouterr().err}"
        assert Path("out").read_bytes() == whole
        again = json.loads(capsys.readouterr().out)
        rows = [[(row["name"], row["n_bytes"], row["error"]) for row in x["in_file"]] for x in (told, again)]
        assert rows[0] == rows[1]
        assert not Path("out.partial").exists()
        Path("out").unlink()
        n += 1
    assert n > 20


@pytest.mark.filterwarnings("always:.*only the end of the clean-up was missing")
def test_a_run_that_is_over_is_said_to_be_complete(
    here: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Journal) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "delete", stop)
        with pytest.raises(Killed):
            compress(here, "out")
    shutil.copytree("out.partial", "copy")
    assert compress(here, "out") == 0
    assert "note: out is complete; only the end of the clean-up was missing" in capsys.readouterr().err
    assert not Path("out.partial").exists()
    shutil.move("copy", "out.partial")
    Path("out").touch()
    assert compress(here, "out") == 2
    assert "out.partial: of a run that is over, but out has changed since; delete the folder" in capsys.readouterr().err


def test_other_inputs_are_refused_and_the_same_in_another_place_are_not(
    here: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compress(here, "whole", *STREAM) == 0
    stop_after(1, lambda: compress(here, "out", *STREAM))
    whole = Path("out.partial/finished.jsonl").read_bytes()

    def refused(what: str, *options: str, **named: str) -> None:
        capsys.readouterr()
        assert compress(here, "out", *options, **named) == 2
        assert f"out.partial: begun by a run with another {what} (" in capsys.readouterr().err
        assert Path("out.partial/finished.jsonl").read_bytes() == whole

    state = __import__(here).model().state_dict()
    shutil.copy("weights.safetensors", "same.safetensors")
    for name in state:
        save_file({**state, name: state[name] * 1.001}, "weights.safetensors")
        refused("weights", *STREAM)
        refused("weights", *STREAM[1:])
    refused("data", *STREAM, data="other_data")
    refused("model", *STREAM, model="plain")
    refused("recipe", *STREAM, "--refit")
    refused("functional", *STREAM, "--functional")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        refused("torch", *STREAM)
        patch.setattr(sparsify, "__version__", "0.0.1")
        refused("sparsify", *STREAM)
    assert compress(here, "out", "--stream", "--weights", "same.safetensors") == 0
    assert Path("out").read_bytes() == Path("whole").read_bytes()


def test_begun_from_disk_it_goes_on_in_memory_and_back(here: str) -> None:
    assert compress(here, "whole", *STREAM) == 0
    for first, then in (STREAM, STREAM[1:]), ([], STREAM):  # without weights, the builder's own, which are the same
        stop_after(1, lambda first=first: compress(here, "out", *first))
        assert compress(here, "out", *then) == 0
        found, whole = load_file("out"), load_file("whole")
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_the_model_that_a_builder_makes_is_known_by_its_weights(
    here: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(1, lambda: compress(here, "out"))
    monkeypatch.setattr(torch, "manual_seed", lambda _: None)  # as a builder without one
    assert compress(here, "out") == 2
    assert "another weights" in capsys.readouterr().err


def test_an_altered_layer_is_refused(here: str, capsys: pytest.CaptureFixture[str]) -> None:
    stop_after(1, lambda: compress(here, "out"))
    other = sparsify.prune(sparsify.convert(torch.nn.Linear(8, 8)), 0.5)
    sparsify.save(other, "out.partial/0.safetensors")
    assert compress(here, "out") == 4
    assert "not the layer '0' that the run has finished" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_disk_without_room_is_noticed_before_the_work(
    here: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 0
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    assert compress(here, "out", *STREAM) == 5
    assert "are needed there and 0 GB are free; free some" in capsys.readouterr().err
    assert not Path("out.partial").exists()
    packed = 8 * 8 // 8 + 8 * 8 * 4 // 2  # a bit of mask for each weight, and the half that stays
    free = 2 * 2 * packed + 2 * 8 * 4
    stop_after(1, lambda: compress(here, "out", *STREAM))
    free -= packed  # which is in the journal
    assert compress(here, "out", *STREAM) == 0


def test_attention_streams_under_the_names_in_its_file(here: str) -> None:
    Path(f"{here}_attention.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n"
        "    torch.manual_seed(0)\n"
        "    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)\n"
        "    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)\n"
        "def data():\n"
        "    return [torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))]\n"
    )
    save_file(runpy.run_path(f"{here}_attention.py")["model"]().state_dict(), "weights.safetensors")
    assert compress(f"{here}_attention", "in-memory", *STREAM[1:]) == 0
    assert compress(f"{here}_attention", "from-disk", *STREAM) == 0
    found, expected = load_file("from-disk"), load_file("in-memory")
    assert found.keys() == expected.keys()
    assert any("in_proj" in name for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

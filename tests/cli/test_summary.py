"""The end of `sparsify compress`: size, share, speed, quality, and lines that load the file."""

import json
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import sparsify
from sparsify.cli import main
from sparsify.cli.quality import COSINE, PERPLEXITY
from sparsify.hardware.timing import LoadMeter

MODULE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

def data():
    return [torch.randn(30, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]

def arguments():
    return (torch.ones(5, 16),)

def ids():
    return [{"input_ids": torch.arange(24).reshape(2, 12)}]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"summed_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def loaded(text: str, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Run the printed lines, and return their model."""
    monkeypatch.syspath_prepend(".")
    scope: dict[str, torch.nn.Module] = {}
    exec(textwrap.dedent(text.partition("load it:\n")[2]), scope)
    return scope["model"]


def test_a_model_of_ones_own(here: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["compress", "--model", f"{here}:build", "--sparsity", "0.5", "--format", "csr", "--out", "a.safetensors"]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert f"size      a.safetensors: {Path('a.safetensors').stat().st_size:,} bytes" in text
    assert "sparse    layers with 94.7% of the model's 676 parameters" in text  # 640 of 676: without biases
    assert "speed     not measured: model" in text
    assert "give --shape (floats)" in text
    model = loaded(text, monkeypatch)
    assert isinstance(model[0], sparsify.CSRLinear)
    for inputs, words in ((["--shape", "16", "--batch", "3"], "3x16"), (["--inputs", f"{here}:arguments"], "5x16")):
        assert main([*options, *inputs]) == 0
        assert f"  on {words}; " in capsys.readouterr().out
    assert main([*options, "--shape", "17", "--json"]) == 2
    assert "does not run on inputs of 1x17" in capsys.readouterr().err
    assert main([*options, "--data", f"{here}:data", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quality"]["dense"] == {COSINE: 1.0}
    assert 0 < found["quality"]["sparse"][COSINE] < 1
    assert found["sparse_share"] == pytest.approx(640 / 676)
    assert found["load"][0] == "import sparsify"
    resumable = [*options, "--data", f"{here}:data", "--method", "wanda", "--resume"]
    assert main([*resumable, "--shape", "16"]) == 2
    assert "--stream and --resume time nothing" in capsys.readouterr().err
    assert main(resumable) == 0
    assert "load it:" in capsys.readouterr().out


def test_a_folder_of_transformers(
    here: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=40, **small)).save_pretrained(tmp_path / "bert")
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt")
    common = ["--sparsity", "0.5", "--format", "csr", "--out", "b.safetensors"]
    assert main(["compress", "--model", "hf:bert", *common, "--seq", "8"]) == 0
    text = capsys.readouterr().out
    assert "  on 1x8 token ids; " in text
    assert type(loaded(text, monkeypatch)) is BertModel
    gpt = ["compress", "--model", "hf:gpt", *common, "--tied", "skip", "--data", f"{here}:ids", "--method", "wanda"]
    assert main([*gpt, "--json"]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert quality["dense"][PERPLEXITY] == pytest.approx(40, rel=0.2)
    assert quality["sparse"][PERPLEXITY] != quality["dense"][PERPLEXITY]


def test_random_weights_of_torchvision_are_said_to_be(
    here: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["compress", "--model", "torchvision:squeezenet1_1", "--sparsity", "0.5", "--format", "csr"]
    options += ["--types", "Conv2d", "--shape", "3,32,32", "--out", "c.safetensors"]
    assert main(options) == 0
    done = capsys.readouterr()
    assert done.err.count("torchvision:squeezenet1_1 has random weights here; --weights DEFAULT") == 1
    assert type(loaded(done.out, monkeypatch)).__name__ == "SqueezeNet"
    assert main([*options, "--weights", "DEFAULTS"]) == 2
    assert "no file, and none of torchvision's for squeezenet1_1: IMAGENET1K_V1" in capsys.readouterr().err

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", no_network)
    assert main([*options, "--weights", "DEFAULT"]) == 2
    assert "--weights IMAGENET1K_V1: torchvision cannot fetch https://" in capsys.readouterr().err


def test_a_choice_on_a_busy_machine_is_measured_again_and_said_to_be_uncertain(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([1.5, 0.0, 1.5, 1.5])
    monkeypatch.setattr(LoadMeter, "others_cores", lambda self: next(busy))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 128))
    fast = sparsify.compress(model, 0.9)
    assert next(busy, None) is None
    rows = sparsify.report(fast)
    assert "uncertain" not in rows[0].reason
    assert rows[1].reason.endswith("; uncertain, 1.5 cores were busy")
    assert "uncertain" not in str(sparsify.report(sparsify.to_dense(fast)))

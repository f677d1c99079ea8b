"""from_pretrained and save_pretrained of transformers with layers of ours, in this process and in a new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_auto import AUTO
from small_models import BUILD, TOKENS, masked, outputs
from torch import nn

import sparsify
from sparsify.kernels.cpu import library as native
from sparsify.layers import Int8Embedding, MaskedLayer, PackedLayer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # transformers warns of itself
]
HERE = Path(__file__).parent
TIED = ("bert", "gpt2", "t5")
CASES = [*((name, "skip") for name in BUILD), *((name, "share") for name in TIED)]


def n_layers(model: nn.Module) -> int:
    return sum(isinstance(module, (PackedLayer, MaskedLayer)) for module in model.modules())


def exported(name: str, tied: str = "skip", form: str = "csr") -> Any:
    return sparsify.export(masked(name, tied=tied), format=form)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def auto(name: str) -> Any:
    return getattr(transformers, AUTO[name])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Save all models, load them in one new process, and return what that found and what it should have."""
    folder = tmp_path_factory.mktemp("models")
    expected = {}
    for name, tied in CASES:
        model = exported(name, tied, "panel" if name == "llama" and native.available() else "csr")
        model.save_pretrained(folder / f"{name}-{tied}", max_shard_size="20KB" if tied == "skip" else "5GB")
        expected[f"{name}-{tied}"] = {"outputs": outputs(name, model), "n_layers": n_layers(model)}
    paths = [str(Path(sparsify.__file__).parents[1]), str(HERE)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "in_new_process.py"), str(folder)]
    subprocess.run(command, check=True, env=environment, timeout=600)
    result: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    return {**result, "expected": expected, "folder": folder}


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_new_process_gives_the_same_bits(name: str, tied: str, found: dict[str, Any]) -> None:
    ours, expected = found["found"][f"{name}-{tied}"], found["expected"][f"{name}-{tied}"]
    assert ours["n_layers"] == expected["n_layers"] > 0
    assert same(ours["outputs"], expected["outputs"])
    assert ("tokens" in ours["outputs"]) == (name not in ("bert", "vit"))


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_without_us_loading_stops_and_names_us(name: str, tied: str, found: dict[str, Any]) -> None:
    assert "import sparsify" in found["errors"][f"{name}-{tied}"]


def test_large_models_come_in_shards(found: dict[str, Any]) -> None:
    for name in BUILD:
        assert len(list((found["folder"] / f"{name}-skip").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("name", BUILD)
def test_masks_come_back(name: str, tmp_path: Path) -> None:
    model = masked(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = auto(name).from_pretrained(tmp_path)
    masks = {key: value for key, value in model.state_dict().items() if key.endswith(".mask")}
    assert masks
    assert all(torch.equal(loaded.state_dict()[key], mask) for key, mask in masks.items())
    assert same(outputs(name, loaded), outputs(name, model))
    assert loaded.training is False


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_masked_folder_is_dense_for_others(name: str, tmp_path: Path) -> None:
    """Read as transformers alone does, without the entry of ours in config.json."""
    model = masked(name, tied="share")
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["quantization_config"]
    assert "transformers_weights" not in content
    (tmp_path / "config.json").write_text(json.dumps(content))
    dense = auto(name).from_pretrained(tmp_path)
    assert n_layers(dense) == 0
    assert same(outputs(name, dense), outputs(name, sparsify.to_dense(model)))


def test_a_removed_weight_hidden_by_a_schedule_stays(tmp_path: Path) -> None:
    model = masked("bert")
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.masked_mode = "frozen"
    with torch.no_grad():
        layer.weight.fill_(2.0)
    model.save_pretrained(tmp_path)
    loaded = auto("bert").from_pretrained(tmp_path).bert.encoder.layer[0].attention.self.query
    assert torch.equal(loaded.weight, layer.weight)
    assert not loaded.mask.all()


@pytest.mark.parametrize("rest", [False, True])
def test_int8_values_and_their_scales(rest: bool, tmp_path: Path) -> None:
    model = sparsify.export(masked("gpt2"), format="csr", quantize="int8-weights", quantize_rest=rest)
    model.save_pretrained(tmp_path)
    loaded = auto("gpt2").from_pretrained(tmp_path)
    assert same(outputs("gpt2", loaded), outputs("gpt2", model))
    kinds = {type(module) for module in loaded.modules() if any(b.dtype == torch.int8 for b in module.buffers(False))}
    assert sparsify.CSRLinear in kinds
    assert (Int8Embedding in kinds) == rest


@pytest.mark.parametrize("kind", ["packed", "masked"])
def test_device_map_and_dtype(kind: str, tmp_path: Path) -> None:
    model = exported("bert") if kind == "packed" else masked("bert")
    model.save_pretrained(tmp_path)
    assert same(outputs("bert", auto("bert").from_pretrained(tmp_path, device_map="auto")), outputs("bert", model))
    half = auto("bert").from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    assert same(outputs("bert", half), outputs("bert", model.to(torch.bfloat16)))


def test_base_of_a_model_with_a_head_and_back(tmp_path: Path) -> None:
    model = exported("bert")
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        expected = model.bert(TOKENS).last_hidden_state
        assert torch.equal(base(TOKENS).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        assert torch.equal(head.bert(TOKENS).last_hidden_state, expected)


def test_a_model_is_plain_in_memory_before_and_after(tmp_path: Path) -> None:
    """No mark of a quantizer stays: `.half()`, a second save and training work as for any model."""
    model = exported("bert")
    model.save_pretrained(tmp_path / "first")
    loaded = auto("bert").from_pretrained(tmp_path / "first")
    for one in (model, loaded):
        assert getattr(one, "hf_quantizer", None) is None
        assert getattr(one.config, "quantization_config", None) is None
        assert "transformers_weights" not in vars(one.config)
    loaded.save_pretrained(tmp_path / "second")
    assert (
        load_file(tmp_path / "first" / "model.safetensors").keys()
        == load_file(tmp_path / "second" / "model.safetensors").keys()
    )
    sparsify.to_dense(loaded).save_pretrained(tmp_path / "dense")
    content = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in content
    assert "transformers_weights" not in content


def test_one_file_is_a_checkpoint(tmp_path: Path) -> None:
    model = exported("bert")
    model.save_pretrained(tmp_path)
    loaded = sparsify.load(tmp_path / "model.safetensors", BUILD["bert"]().eval())
    assert same(outputs("bert", loaded), outputs("bert", model))


def test_pruned_while_loading(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = BUILD["gpt2"]()
    dense.save_pretrained(tmp_path)
    config = sparsify.SparsifyConfig(sparsity=0.5, exclude=["lm_head"], format="csr")
    fast = auto("gpt2").from_pretrained(tmp_path, quantization_config=config)
    expected = sparsify.export(sparsify.prune(sparsify.convert(dense.eval(), tied="skip"), 0.5), format="csr")
    assert n_layers(fast) == n_layers(expected) > 0
    assert same(outputs("gpt2", fast), outputs("gpt2", expected))
    trainable = auto("gpt2").from_pretrained(
        tmp_path, quantization_config=sparsify.SparsifyConfig(pattern="2:4", layers="masked")
    )
    assert all(m.sparsity == 0.5 for m in trainable.modules() if isinstance(m, MaskedLayer))
    with pytest.raises(ValueError, match="give a sparsity"):
        auto("gpt2").from_pretrained(tmp_path, quantization_config=sparsify.SparsifyConfig())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.5, "method": "wanda"}, "without data: magnitude"),
        ({"sparsity": 1.5}, "1.5"),
        ({"sparsity": 0.7, "pattern": "2:4"}, "2:4"),
        ({"sparsity": 0.5, "layers": "sparse"}, "packed, masked"),
        ({"sparsity": 0.5, "layers": "masked", "format": "csr"}, "no effect"),
        ({"version": 2}, "upgrade"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sparsify.SparsifyConfig(**options)


def altered(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    with open(folder / "model.safetensors", "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(n))["__metadata__"]
    save_file(tensors, folder / "model.safetensors", metadata)


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.dense.weight.values", "bert.embeddings.LayerNorm.bias"])
def test_an_altered_tensor_is_refused(name: str, tmp_path: Path) -> None:
    exported("bert").save_pretrained(tmp_path)
    altered(tmp_path, name)
    with pytest.raises(sparsify.CheckpointError, match="altered"):
        auto("bert").from_pretrained(tmp_path)


def test_a_file_without_our_header_is_refused(tmp_path: Path) -> None:
    exported("bert").save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(sparsify.CheckpointError, match="no sparsify header"):
        auto("bert").from_pretrained(tmp_path)


def test_a_shard_left_out_of_the_index_is_noticed(tmp_path: Path) -> None:
    exported("bert").save_pretrained(tmp_path, max_shard_size="20KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    gone = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {key: value for key, value in index["weight_map"].items() if value != gone}
    file.write_text(json.dumps(index))
    with pytest.raises(sparsify.CheckpointError, match="are all files there"):
        auto("bert").from_pretrained(tmp_path)


def test_an_index_reaches_no_other_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    exported("bert").save_pretrained(folder, max_shard_size="20KB")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    moved = sorted(set(index["weight_map"].values()))[0]
    (folder / moved).rename(tmp_path / moved)
    index["weight_map"] = {k: f"../{moved}" if v == moved else v for k, v in index["weight_map"].items()}
    file.write_text(json.dumps(index))
    with pytest.raises((sparsify.CheckpointError, OSError, ValueError), match=r"one folder|\.\."):
        auto("bert").from_pretrained(folder)


def test_a_config_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    exported("bert").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"]["sparsity"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'sparsity' unknown"):
        auto("bert").from_pretrained(tmp_path)


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    exported("bert").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["hidden_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(sparsify.CheckpointError, match="another architecture"):
        auto("bert").from_pretrained(tmp_path)


def test_masked_and_exported_layers_are_not_mixed(tmp_path: Path) -> None:
    model = exported("bert")
    model.bert.pooler = sparsify.convert(nn.Sequential(nn.Linear(32, 32)))
    with pytest.raises(ValueError, match="one kind"):
        model.save_pretrained(tmp_path)

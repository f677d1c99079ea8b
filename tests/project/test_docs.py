"""The documents are run: the README's code, the format page's recipe for reading, the recipe page's keys."""

import hashlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import api
import assets
import numpy as np
import pytest
import safetensors
import torch
from torch import nn

import sparsify
from sparsify import cli
from sparsify.masking.schedules import Kind, Schedule
from sparsify.recipes.schema import Group, Recipe

ROOT = Path(__file__).resolve().parents[2]


def python_blocks(page):
    """Return the blocks of Python in a page; a page without any is an error."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    return blocks


def test_the_readme_example_runs(tmp_path, monkeypatch, capsys):
    blocks = python_blocks("README.md")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        names = {}
        exec(block, names)
        assert names["model"][0].sparsity == pytest.approx(0.9, abs=1e-4)
        x = torch.randn(3, 256)
        torch.testing.assert_close(names["fast"](x), names["model"](x))
    assert "total" in capsys.readouterr().out


def test_the_page_for_users_of_other_libraries_runs():
    """Its blocks build on each other, so they share their names."""
    names = {}
    for block in python_blocks("docs/coming-from.md"):
        exec(block, names)
    assert isinstance(names["layer"], sparsify.SparseLinear)


def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    """Its blocks build on each other, so they share their names."""
    for package in ("minilm", "lee"):
        if assets.missing_files(package):
            pytest.skip(f".assets/{package} is missing; run scripts/assets.py {package}")
    pytest.importorskip("transformers", reason="transformers is missing: pip install 'sparsify-torch[hf]'")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in python_blocks("docs/guide.md"):
        exec(block, names)
    assert names["by_wanda"] > names["by_magnitude"]
    assert names["pruner"].sparsity == pytest.approx(0.9, abs=0.01)
    assert (tmp_path / "small.safetensors").exists()
    assert "50%: magnitude" in capsys.readouterr().out
    (tmp_path / "small.safetensors").unlink()
    (tmp_path / ".assets").symlink_to(assets.ASSETS)
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.DOTALL):
        for line in block.splitlines():
            assert cli.main(shlex.split(line)[1:]) == 0, line
    assert (tmp_path / "small.safetensors").exists()


def read_with_the_page_alone(path):
    """Read a checkpoint as docs/formats.md says, with safetensors and numpy and nothing of this library."""
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        dtypes = {name: file.get_slice(name).get_dtype() for name in tensors}
    assert metadata["format"] == "pt"
    assert hashlib.sha256(metadata["sparsify"].encode()).hexdigest() == metadata["sha256"]
    header = json.loads(metadata["sparsify"])
    assert header["version"] == (2 if any("dequantized" in entry for entry in header["layers"].values()) else 1)
    assert set(header["tensors"]) == set(tensors)
    for name, tensor in tensors.items():
        text = f"{dtypes[name]} {','.join(map(str, tensor.shape))} "
        assert hashlib.sha256(text.encode() + tensor.tobytes()).hexdigest() == header["tensors"][name]
    weights = {}
    for name, entry in header["layers"].items():
        start = f"{name}.weight".lstrip(".")
        shape = entry["out_features"], entry["in_features"]
        scale = tensors[f"{start}.scale"][:, None] if "dequantized" in entry else 1
        if entry["format"] == "dense":
            weights[name] = tensors[start] * scale
            continue
        values = tensors[f"{start}.values"]
        mask = np.zeros(shape, bool)
        if entry["format"] == "bitmask":
            bits = np.unpackbits(tensors[f"{start}.bits"], bitorder="little")
            mask.reshape(-1)[:] = bits[: mask.size].astype(bool)
        else:
            crow, col = tensors[f"{start}.crow"], tensors[f"{start}.col"]
            for row in range(shape[0]):
                mask[row, col[crow[row] : crow[row + 1]].astype(int)] = True
        weights[name] = np.zeros(shape, values.dtype)
        weights[name][mask] = values
        weights[name] = weights[name] * scale
    return header, weights


@pytest.mark.parametrize(("sparsity", "format_"), [(0.0, "dense"), (0.5, "bitmask"), (0.99, "csr")])
@pytest.mark.parametrize("in_features", [200, 300])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_file_can_be_read_with_the_format_page_alone(tmp_path, sparsity, format_, in_features, quantize):
    model = sparsify.convert(nn.Sequential(nn.Linear(in_features, 40), nn.ReLU(), nn.Linear(40, 3)))
    sparsify.prune(model, sparsity)
    fast = sparsify.export(model, format="csr", quantize=quantize)
    expected = {name: (fast.get_submodule(name).weight + 0).numpy() for name in ("0", "2")}
    sparsify.save(fast, tmp_path / "model.safetensors")
    header, weights = read_with_the_page_alone(tmp_path / "model.safetensors")
    assert header["layers"]["0"]["format"] == (format_ if quantize is None or sparsity else "bitmask")  # zeros
    for name, weight in expected.items():
        np.testing.assert_array_equal(weights[name], weight)


def test_the_format_page_reads_a_root_layer_and_one_left_dense(tmp_path):
    root = sparsify.convert(nn.Linear(64, 8))
    sparsify.prune(root, 0.75)
    sparsify.save(sparsify.export(root, format="dense"), tmp_path / "root.safetensors")
    header, weights = read_with_the_page_alone(tmp_path / "root.safetensors")
    assert header["layers"][""]["module"] == "Linear"
    np.testing.assert_array_equal(weights[""], root.masked_weight().detach().numpy())


def test_the_recipe_page_names_every_key_and_no_other():
    text = (ROOT / "docs/recipes.md").read_text()
    described = set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE))
    kinds = set(get_args(Kind))
    assert described == set(Recipe.model_fields) | set(Group.model_fields) | kinds
    named = set()
    for kind in kinds:
        keys = re.search(rf"^\| `{kind}` \| .* \| (.*)\|$", text, re.MULTILINE)[1]
        named |= set(re.findall(r"`(\w+)`", keys))
    assert named | {"kind", "unit"} == {field.name for field in fields(Schedule)}


def test_importing_sparsify_imports_no_optional_package():
    """An optional or slow package is imported at its use."""
    optional = {"accelerate", "gguf", "lightning", "matplotlib", "onnx", "onnxruntime", "openvino", "peft", "PIL"}
    optional |= {"sklearn", "tensorboard", "tokenizers", "torchvision", "transformers", "triton"}
    code = (
        "import sys, torch; before = {*sys.modules}; import sparsify, sparsify.cli; "  # torch may import some itself
        "print(*{name.split('.')[0] for name in {*sys.modules} - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = set(done.stdout.split())
    assert "sparsify" in imported
    assert not imported & optional


def test_the_reference_is_current():
    """Pydantic writes the signature of a Recipe differently from version to version."""
    written, now = (
        re.sub(r"```text\nRecipe\(.*?```", "", text, flags=re.DOTALL) for text in (api.PAGE.read_text(), api.page())
    )
    assert written == now, "run scripts/api.py"

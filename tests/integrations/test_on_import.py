"""Registering with other libraries: nothing is imported before it is there, and the order does not count."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import TOKENS, masked
from torch import nn

import sparsify
from sparsify.integrations import foreign_quantizers, on_import

pytestmark = pytest.mark.filterwarnings("default")  # these libraries warn of themselves and of each other


def run(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsify.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


def test_nothing_is_imported_before_it_is_there() -> None:
    run(
        "import sys, sparsify\n"
        "others = {'transformers', 'diffusers', 'peft', 'timm', 'sentence_transformers', 'torchao', 'accelerate'}\n"
        "assert not others & {name.partition('.')[0] for name in sys.modules}\n"
        "from transformers.modeling_utils import PreTrainedModel\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'sparsify' in AUTO_QUANTIZER_MAPPING and PreTrainedModel.save_pretrained.of_sparsify\n"
        "assert 'sparsify' not in sys.modules['transformers.modeling_utils'].__loader__.__class__.__module__\n"
    )


def test_every_hook_names_modules_of_ours() -> None:
    for name in on_import.HOOKS.values():
        assert (Path(sparsify.__file__).parents[1] / f"{name.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("name", ["transformers.modeling_utils", "diffusers.models.modeling_utils"])
def test_a_module_of_ours_may_be_imported_first(name: str) -> None:
    run(
        f"import sys, sparsify, {on_import.HOOKS[name]}\n"
        "from sparsify.integrations import on_import\n"
        f"assert {name!r} in on_import._registered\n"
    )


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for key, value in options.items():
        config._register_custom_module({getattr(sparsify, key): value})
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("verb", ["merge_and_unload", "merge_adapter", "layer"])
def test_merging_into_a_masked_layer_is_refused(verb: str) -> None:
    model = lora(masked("llama"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    merge = layer.merge if verb == "layer" else getattr(model, verb)
    with torch.no_grad():
        before = model(TOKENS).logits
        with pytest.raises(ValueError, match="the mask of its layer removes"):
            merge()
        assert torch.equal(model(TOKENS).logits, before)


def test_merging_where_no_weight_is_removed() -> None:
    torch.manual_seed(0)
    model = masked("llama")
    sparsify.to_dense(model)
    sparsify.convert(model)
    model = lora(model)
    with torch.no_grad():
        before = model(TOKENS).logits
        torch.testing.assert_close(model.merge_and_unload()(TOKENS).logits, before)


def test_adapters_on_exported_layers() -> None:
    peft = pytest.importorskip("peft")
    model = lora(sparsify.export(masked("llama"), format="csr"), CSRLinear=peft.tuners.lora.Linear)
    model(TOKENS).logits.square().mean().backward()
    trained = [name for name, value in model.named_parameters() if value.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    with pytest.raises(ValueError, match="exported layer is packed"):
        model.merge_and_unload()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for torchao and quanto, registered with; the names of their functions that ran."""
    ran: list[str] = []

    def quantize_(model: nn.Module, config: Any, filter_fn: Any = None) -> None:
        ran.append("torchao")

    def quantize(model: nn.Module, *, include: Any = None, exclude: Any = None) -> None:
        ran.append("quanto")

    torchao, quanto = types.ModuleType("torchao.quantization.quant_api"), types.ModuleType("optimum.quanto.quantize")
    torchao.quantize_, quanto.quantize = quantize_, quantize  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, torchao.__name__, torchao)
    monkeypatch.setitem(sys.modules, quanto.__name__, quanto)
    foreign_quantizers.register()
    return ran


@pytest.mark.parametrize("kind", ["masked", "exported"])
def test_torchao_refuses(kind: str, calls: list[str]) -> None:
    model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), 0.5)
    model = model if kind == "masked" else sparsify.export(model, format="csr")
    quantize_ = sys.modules["torchao.quantization.quant_api"].quantize_
    with pytest.raises(ValueError, match=f"0: torchao cannot round this {kind} layer"):
        quantize_(model, None)
    quantize_(model, None, lambda module, name: False)
    quantize_(sparsify.to_dense(model), None)
    assert calls == ["torchao", "torchao"]


def test_quanto_refuses(calls: list[str]) -> None:
    model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), 0.5)
    quantize = sys.modules["optimum.quanto.quantize"].quantize
    quantize(model)
    with pytest.raises(ValueError, match="0: quanto cannot round this exported layer"):
        quantize(sparsify.export(model, format="csr"))
    quantize(sparsify.export(model, format="csr"), exclude="0")
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    with pytest.raises(ValueError, match="masked layer"):
        quantize(model)
    assert calls == ["quanto", "quanto"]

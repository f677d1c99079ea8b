"""save_pretrained and from_pretrained for each library, and the card in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_models import masked, outputs
from torch import nn

import sparsify
from sparsify.checkpoint.folder import kind_of
from sparsify.cli.models import build_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # these libraries warn of themselves and of each other
]
MINILM = Path(__file__).parents[2] / ".assets" / "minilm"
SCRATCH = {"model_args": {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}}


def dit() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


@torch.no_grad()
def sample(model: Any) -> torch.Tensor:
    x, steps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    if "DiT" in type(model).__name__:
        return model(x, timestep=steps, class_labels=steps).sample
    return model(x, steps, encoder_hidden_states=torch.ones(2, 5, 16)).sample


def pruned(model: nn.Module, kind: str) -> Any:
    sparse = sparsify.prune(sparsify.convert(model.eval()), 0.7)
    return sparse if kind == "masked" else sparsify.export(sparse, format="csr")


@pytest.mark.parametrize("kind", ["packed", "masked"])
@pytest.mark.parametrize("build", [dit, unet])
def test_diffusers(build: Any, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = pruned(build(), kind)
    model.save_pretrained(tmp_path / "own", max_shard_size="50KB")
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 1
    for loaded in (type(model).from_pretrained(tmp_path / "own"), sparsify.from_pretrained(tmp_path / "own")):
        assert kind_of(loaded) == kind
        assert torch.equal(sample(loaded), sample(model))
    sparsify.to_dense(loaded).save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    assert kind_of(dense) is None
    assert torch.equal(sample(dense), sample(loaded))
    half = type(model).from_pretrained(tmp_path / "own", torch_dtype=torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


def test_diffusers_prunes_while_loading(tmp_path: Path) -> None:
    model = dit()
    model.save_pretrained(tmp_path)
    config = sparsify.SparsifyConfig(sparsity=0.5, format="csr")
    assert kind_of(type(model).from_pretrained(tmp_path, quantization_config=config)) == "packed"


def test_diffusers_refuses_an_altered_file(tmp_path: Path) -> None:
    model = pruned(dit(), "packed")
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(sparsify.CheckpointError, match="altered"):
        type(model).from_pretrained(tmp_path)


def test_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = pruned(timm.create_model("vit_tiny_patch16_224", num_classes=3, **SCRATCH["model_args"]), "packed")
    sparsify.save_pretrained(model, tmp_path, **SCRATCH)
    loaded = sparsify.from_pretrained(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    content = json.loads((tmp_path / "config.json").read_text())
    for args in ({"checkpoint_path": "x.pth"}, {"pretrained": True}, {"act_layer": {"a": 1}}):
        (tmp_path / "config.json").write_text(json.dumps(content | {"model_args": args}))
        with pytest.raises(ValueError, match="plain arguments"):
            sparsify.from_pretrained(tmp_path)


def test_timm_on_the_command_line() -> None:
    timm = pytest.importorskip("timm")
    assert type(build_model("timm:test_vit")) is type(timm.create_model("test_vit"))
    with pytest.raises(ValueError, match="timm has no model 'test_vitt'"):
        build_model("timm:test_vitt")


@pytest.mark.skipif(not MINILM.is_dir(), reason="MiniLM is not there: scripts/assets.py minilm")
def test_sentence_transformers(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    first = Transformer(str(MINILM))
    modules = [first, Pooling(first.get_embedding_dimension()), Normalize()]
    model = library.SentenceTransformer(modules=modules, device="cpu")
    sparsify.prune(sparsify.convert(model, include=["0.model.encoder.layer.*"]), 0.5)
    fast = sparsify.export(model, format="csr")
    texts = ["A cat sits on a mat.", "Prices rose by two percent in May."]
    fast.save(str(tmp_path / "own"))
    again = library.SentenceTransformer(str(tmp_path / "own"), device="cpu")
    ours = sparsify.from_pretrained(tmp_path / "own", device="cpu")
    for loaded in (again, ours):
        assert kind_of(loaded) == "packed"
        assert (loaded.encode(texts) == fast.encode(texts)).all()
    card = (tmp_path / "own" / "README.md").read_text()
    assert 'SentenceTransformer("FOLDER")' in card
    assert "sentence-similarity" in card
    content = json.loads((tmp_path / "own" / "modules.json").read_text())
    content[0]["type"] = "antigravity.Module"
    (tmp_path / "own" / "modules.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no other code is run"):
        sparsify.from_pretrained(tmp_path / "own")


def skeleton(lines: list[str]) -> list[str]:
    """Return headings, marks, and the names of the facts at the beginning of a card."""
    first = next(i for i, line in enumerate(lines) if line.startswith("## "))
    facts = [line.split("|")[1] for line in lines[:first] if line.startswith("|")]
    return [line for line in lines if line.startswith(("#", "<!--", "---"))] + facts


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    model = sparsify.export(masked("bert"), tokens=8)
    model.config._name_or_path = "some/encoder"
    recipe = sparsify.Recipe(groups=[{"sparsity": 0.7}])
    sparsify.save_pretrained(model, tmp_path, recipe=recipe, quality={"Lee": 0.641}, speed={"batch 1": "2.5 ms"})
    card = (tmp_path / "README.md").read_text()
    _, front, _ = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["sparsify", "pruning", "sparse"],
        "base_model": "some/encoder",
        "base_model_relation": "quantized",
    }
    for words in ("70.", "from transformers import BertForMaskedLM", "- sparsity: 0.7", "Lee", "0.641", "2.5 ms", "MB"):
        assert words in card, words
    assert "measured one by one at export" in card
    page = (Path(__file__).parents[2] / "docs/model-card.md").read_text().partition("The file:")[2].splitlines()
    assert skeleton([line[4:] for line in page if line.startswith("    ")]) == skeleton(card.splitlines())
    loaded = sparsify.from_pretrained(tmp_path)
    assert torch.equal(outputs("bert", loaded)["logits"], outputs("bert", model)["logits"])
    sparsify.save_pretrained(model, tmp_path, base_model="another/encoder")
    assert (tmp_path / "README.md").read_text().count("another/encoder") == 3
    assert "some/encoder" not in (tmp_path / "README.md").read_text()


def test_an_export_that_stayed_dense(tmp_path: Path) -> None:
    model = sparsify.export(masked("bert"), format="dense")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < sum(p.nbytes for p in model.parameters())
    loaded = sparsify.from_pretrained(tmp_path)
    assert torch.equal(outputs("bert", loaded)["logits"], outputs("bert", model)["logits"])


def test_a_card_keeps_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\n\nMy words.\n")
    model = sparsify.export(masked("bert"), format="csr")
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    assert first.count("# Sparse model") == 1
    assert first.startswith("---\nlicense: mit\ntags:\n- mine\n- sparsify\nlibrary_name: transformers\n")
    assert "# My model\n\nMy words.\n" in first


def test_push_uploads_config_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's own card is written over ours before the upload; ours is put in again."""
    from transformers.modeling_utils import PreTrainedModel

    seen: dict[str, str] = {}
    model = sparsify.export(masked("bert"), format="csr")

    def upload(self: Any, folder: str, *_: Any, **__: Any) -> None:
        seen.update({file.name: file.read_text() for file in Path(folder).iterdir() if file.suffix != ".safetensors"})

    inner = PreTrainedModel._upload_modified_files.__wrapped__
    code = PreTrainedModel._upload_modified_files.__closure__
    cell = next(cell for cell in code if cell.cell_contents is inner)
    monkeypatch.setattr(cell, "cell_contents", upload)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags: []\n---\n\nFrom the Hub.\n")
    model._upload_modified_files(str(tmp_path), "some/name", {})
    assert "From the Hub." in seen["README.md"]
    assert "# Sparse model" in seen["README.md"]
    assert "import sparsify first" in seen["config.json"]


def test_wrong_models_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sparse layers"):
        sparsify.save_pretrained(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match=r"sparsify\.save\(model"):
        sparsify.save_pretrained(sparsify.convert(nn.Sequential(nn.Linear(2, 2))), tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        sparsify.from_pretrained(tmp_path)
    for name in ("PreTrainedModel.from_pretrained", "pipeline", "os", None):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        with pytest.raises(ValueError, match="no model class of transformers"):
            sparsify.from_pretrained(tmp_path)

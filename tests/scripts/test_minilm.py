"""The whole flow on a real pretrained model: MiniLM-L6, its published numbers, and what pruning does to them."""

from pathlib import Path

import assets
import pytest
import torch
from torch import nn

import sparsify

for name in ("minilm", "lee", "brown"):
    if assets.missing_files(name):
        pytest.skip(
            f".assets/{name} is missing: {assets.PACKAGES[name].requirement} was not fetched; run scripts/assets.py",
            allow_module_level=True,
        )
pytest.importorskip("transformers", reason="transformers is missing: pip install 'sparsify-torch[hf]'")

import oneshot  # noqa: E402
from oneshot_tables.page import page  # noqa: E402
from pretrained import brown, minilm  # noqa: E402

SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """The pretrained model; no test changes it."""
    return minilm.load_dense()


def pruned(sparsity: float) -> nn.Module:
    model = sparsify.convert(minilm.load_dense(), include=minilm.ENCODER_LAYERS)
    sparsify.prune(model, sparsity, method="magnitude", pattern="unstructured", allocation="uniform")
    return model


def lee(model: nn.Module) -> float:
    return minilm.lee_correlation(minilm.embed(minilm.lee_documents(), model), minilm.lee_ratings())


def test_dense_cosines_are_those_the_model_documents(dense: nn.Module) -> None:
    embeddings = minilm.embed(SENTENCES, dense)
    cosines = embeddings @ embeddings.T
    expected = torch.tensor([0.6660, 0.1046, 0.1411])
    torch.testing.assert_close(cosines[[0, 0, 1], [1, 2, 2]], expected, rtol=0, atol=1e-3)


def test_dense_lee_correlation(dense: nn.Module) -> None:
    assert lee(dense) == pytest.approx(0.656, abs=1e-3)


def test_lee_interval_holds_the_correlation_and_knows_its_size(dense: nn.Module) -> None:
    embeddings, ratings = minilm.embed(minilm.lee_documents(), dense), minilm.lee_ratings()
    low, high = minilm.lee_interval(embeddings, ratings)
    assert low < minilm.lee_correlation(embeddings, ratings) < high
    assert 0.05 < high - low < 0.3  # 50 documents: about 0.16
    assert minilm.lee_interval(embeddings, ratings) == (low, high)


@pytest.mark.skipif(bool(assets.missing_files("wikipedia")), reason="run scripts/assets.py")
def test_prose_to_calibrate_on_is_of_no_file_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brown, "corpus", lambda: {"ca01": ["lion"] * 200, "ca02": ["tiger"] * 200})
    sources = minilm._sources.__wrapped__(True)
    assert list(sources) == ["news", "Wikipedia", "prose"]
    lion, tiger = (minilm.load_tokenizer().encode(word).ids[1] for word in ("lion", "tiger"))
    ids = torch.cat([batch["input_ids"] for batch in sources["prose"]])
    assert bool((ids == tiger).any())
    assert not bool((ids == lion).any())


def test_convert_touches_the_36_encoder_linears_and_changes_no_output(dense: nn.Module) -> None:
    converted = sparsify.convert(minilm.load_dense(), include=minilm.ENCODER_LAYERS)
    layers = [name for name, module in converted.named_modules() if isinstance(module, sparsify.SparseLinear)]
    assert layers == list(minilm.encoder_linears(dense))
    assert len(layers) == 36
    assert torch.equal(minilm.embed(SENTENCES, converted), minilm.embed(SENTENCES, dense))


def test_magnitude_at_half_costs_what_it_is_known_to_cost() -> None:
    assert lee(pruned(0.5)) == pytest.approx(0.584, abs=0.005)


@pytest.mark.parametrize(("sparsity", "share"), [(0.5, 0.60), (0.9, 0.17)])
def test_save_is_small_and_loads_onto_a_fresh_model(
    dense: nn.Module, sparsity: float, share: float, tmp_path: Path
) -> None:
    model = pruned(sparsity)
    fast = sparsify.export(model, format="csr")
    file = tmp_path / "model.safetensors"
    sparsify.save(fast, file)
    loaded = sparsify.load(file, minilm.build_fresh())

    csr_layers = [name for name, module in loaded.named_modules() if isinstance(module, sparsify.CSRLinear)]
    assert csr_layers == list(minilm.encoder_linears(dense))
    outputs = minilm.embed(SENTENCES, loaded)
    assert torch.equal(outputs, minilm.embed(SENTENCES, fast))
    torch.testing.assert_close(outputs, minilm.embed(SENTENCES, model), rtol=0, atol=1e-5)
    assert_exactly_sparse(loaded, sparsity)

    # Everything but the encoder Linears is stored as it was, so the whole file's saving, header included, is theirs.
    layer_bytes = sum(
        tensor.nbytes for layer in minilm.encoder_linears(dense).values() for tensor in layer.parameters()
    )
    other_bytes = minilm.DENSE_FILE.stat().st_size - layer_bytes
    assert file.stat().st_size - other_bytes <= share * layer_bytes


def assert_exactly_sparse(model: nn.Module, sparsity: float) -> None:
    layers = minilm.encoder_linears(sparsify.to_dense(model))
    assert len(layers) == 36
    for name, layer in layers.items():
        assert int((layer.weight == 0).sum()) == round(sparsity * layer.weight.numel()), name


def test_sparsegpt_keeps_more_than_magnitude(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On six documents instead of 300; magnitude is at 0.671."""
    out = tmp_path / "cells.jsonl"
    oneshot.main(["--methods", "SparseGPT", "--columns", "50%", "--samples", "6", "--out", str(out)])
    cells = oneshot.read(out)
    assert cells["minilm | dense | 0%"]["cosine"] == pytest.approx(1)
    cell = cells["minilm | SparseGPT | 50%"]
    assert cell["sparsity"] == pytest.approx(0.5, abs=1e-5)
    assert cell["cosine"] > 0.75
    assert f"| SparseGPT | {cell['cosine']:.3f} |" in page(cells)
    capsys.readouterr()
    oneshot.main(["--methods", "SparseGPT", "--columns", "50%", "--samples", "6", "--out", str(out)])
    assert '"cell"' not in capsys.readouterr().out  # it was there

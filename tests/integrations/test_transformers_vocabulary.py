"""tie_weights and resize_token_embeddings of transformers on models with a tied, masked or packed vocabulary."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_auto import AUTO
from small_models import BUILD, TOKENS, masked
from torch import Tensor

import sparsify

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # transformers warns of itself
]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS, **({"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {})).logits


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_a_packed_head_and_its_embedding_count_as_tied(name: str, tmp_path: Path) -> None:
    model = sparsify.export(masked(name, tied="share"), format="csr")
    before = logits(model)
    model.save_pretrained(tmp_path)
    for tied in (model, getattr(transformers, AUTO[name]).from_pretrained(tmp_path)):
        known = dict(tied.all_tied_weights_keys)
        assert known
        tied.tie_weights()
        assert torch.equal(logits(tied), before)
        assert tied.all_tied_weights_keys == known
        check_a_change_is_refused(tied)


def check_a_change_is_refused(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 4] += 1
    with pytest.raises(
        ValueError, match=r"(lm_head|decoder)\.weight and .* differ, and one of them is packed: .*to_dense\(model\)"
    ):
        model.tie_weights()
    model.config.tie_word_embeddings = False
    model.tie_weights()


@pytest.mark.parametrize("form", ["masked", "exported", "int8"])
def test_no_vocabulary_of_ours_is_resized(form: str) -> None:
    model = masked("gpt2", tied="share")
    if form == "exported":
        model = sparsify.export(model, format="csr")
    elif form == "int8":
        model = sparsify.export(model, format="csr", quantize="int8-weights")
    before = logits(model)
    wanted = r"(transformer\.wte|lm_head): a (masked|exported) layer, 64 tokens, and resize_token_embeddings would"
    for arguments in ({"new_num_tokens": 70}, {"pad_to_multiple_of": 48}):
        with pytest.raises(ValueError, match=wanted):
            model.resize_token_embeddings(**arguments)
        assert torch.equal(logits(model), before)
        assert model.config.vocab_size == 64
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.resize_token_embeddings(64)
    assert torch.equal(logits(model), before)


def test_a_vocabulary_without_layers_of_ours_is_resized_and_tied() -> None:
    torch.manual_seed(0)
    model = sparsify.convert(BUILD["gpt2"]().eval(), tied="skip")
    fast = sparsify.export(sparsify.prune(model, 0.5), format="csr")
    for any_kind in (model, fast):
        any_kind.resize_token_embeddings(70)
        assert any_kind.lm_head.weight is any_kind.transformer.wte.weight
        assert len(any_kind.lm_head.weight) == 70

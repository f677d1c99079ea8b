"""Greedy decoding with a static cache: an exported model gives the tokens of the masked one."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is missing: pip install 'sparsify-torch[hf]'")

import generate
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = ["model.layers.*"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_an_exported_model_generates_what_the_masked_one_does(sparsity: float) -> None:
    prompt = torch.tensor([[3, 14, 15, 9, 2]])
    dense, masked, sparse = generate.compare(llama(), prompt, sparsity, 12, LAYERS, rounds=2)
    assert dense[1:3] == ["dense", masked[2]]
    assert float(sparse[2]) <= float(dense[2])  # layers as small as these may stay dense
    assert sparse[5] == "all 12 tokens as masked"


def test_a_run_is_what_generate_gives() -> None:
    model, prompt = llama(), torch.tensor([[3, 14, 15, 9, 2]])
    with torch.inference_mode():
        generator = generate.Generator(model, prompt, 9)
        first, again = generator.run()[0], generator.run()[0]
        expected = model.generate(prompt, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(first, again)
    assert torch.equal(first, expected[0, 5:])


def test_where_texts_part_the_gap_is_told() -> None:
    model, prompt = llama(), torch.tensor([[3, 14, 15, 9, 2]])
    with torch.inference_mode():
        tokens, _ = generate.Generator(model, prompt, 6).run()
        logits = model(torch.cat([prompt, tokens[None, :3]], 1)).logits[0, -1]
        other = tokens.clone()
        other[3] = logits.argmin()
        text = generate.agreement(model, prompt, tokens, other)
    assert text.startswith(f"3 tokens as masked, then one {float(logits.max() - logits.min()):.2g} below")

"""Six architectures of transformers, small: each with its class, an input, and a generation if it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

import sparsify

TOKENS = torch.arange(1, 25).reshape(2, 12)
SMALL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    return transformers.BertForMaskedLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, **SMALL)
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        **SMALL,
    )
    return transformers.LlamaForCausalLM(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **SMALL,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _speech() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))}


BUILD: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
    "vit": _vit,
    "whisper": _whisper,
}


def masked(name: str, *, tied: str = "skip") -> Any:
    """Return a masked model with drawn weights, the same in every process."""
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    return sparsify.prune(sparsify.convert(model, tied=tied), 0.7)


@torch.no_grad()
def outputs(name: str, model: Any) -> dict[str, torch.Tensor]:
    """Return a model's outputs, and the tokens that it generates."""
    if name == "vit":
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return {"logits": model(pixel_values=pixels.to(model.dtype)).logits}
    if name == "whisper":
        given = {key: value.to(model.dtype) for key, value in _speech().items()}
        return {
            "logits": model(**given, decoder_input_ids=TOKENS).logits,
            "tokens": model.generate(**given, max_new_tokens=8, do_sample=False),
        }
    if name == "bert":
        return {"logits": model(TOKENS).logits}
    more = {"decoder_input_ids": TOKENS} if name == "t5" else {}
    return {
        "logits": model(input_ids=TOKENS, **more).logits,
        "tokens": model.generate(TOKENS, max_new_tokens=8, do_sample=False),
    }

"""transformers' models, by their class. The full size is the default of its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sparsify.reporting.model_run import Inputs
from zoo_models.model import Model

#: A small model, in the words that most configurations have.
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
#: The head is tied to the embedding, and stays dense with it.
SKIP = {"tied": "skip"}
#: Or both have one mask.
SHARE = {"tied": "share"}
#: All experts of a layer are one Parameter.
EXPERTS = {"functional": True}
#: Special tokens have to lie inside a small vocabulary.
WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

Make = Callable[[int, int], Tensor]


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 60, (batch, length))


def _pixels(size: int) -> Make:
    return lambda batch, _: torch.randn(batch, 3, size, size)


def _model(
    name: str,
    config: str,
    sizes: Mapping[str, Any],
    inputs: Mapping[str, Make],
    *,
    full_inputs: Mapping[str, Make] | None = None,
    **options: Any,
) -> Model:
    """Name a model, its configuration, the sizes of the small one, and a maker (batch, length) of each input."""

    def build(**sizes: Any) -> nn.Module:
        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**sizes))
        return model

    def full() -> nn.Module:
        # the other attentions look into the mask, and there it has no data
        model = build(attn_implementation="eager")
        # without data, the products of experts know this type alone
        return model.bfloat16() if options.get("convert") is EXPERTS else model

    def make(inputs: Mapping[str, Make], batch: int, length: int) -> Inputs:
        return {key: function(batch, length) for key, function in inputs.items()}

    return Model(
        small=partial(build, **sizes),
        inputs=partial(make, inputs, 2, 6),
        full=full,
        full_inputs=partial(make, full_inputs or inputs, 1, 128),
        **options,
    )


_IDS = {"input_ids": _ids}
_PAIR = {"input_ids": _ids, "decoder_input_ids": _ids}
_IMAGE = {"pixel_values": _pixels(32)}
_FULL_IMAGE = {"pixel_values": _pixels(224)}

MODELS = {
    "BertForMaskedLM": _model("BertForMaskedLM", "BertConfig", SMALL | WORDS, _IDS, convert=SKIP),
    "RobertaForMaskedLM": _model("RobertaForMaskedLM", "RobertaConfig", SMALL | WORDS, _IDS, convert=SKIP),
    "DistilBertForMaskedLM": _model(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, **WORDS},
        _IDS,
        convert=SKIP,
    ),
    "GPT2LMHeadModel": _model(
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, **WORDS}, _IDS, convert=SHARE
    ),
    "OPTForCausalLM": _model(
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | WORDS,
        _IDS,
        convert=SKIP,
    ),
    "LlamaForCausalLM": _model("LlamaForCausalLM", "LlamaConfig", SMALL | WORDS | {"num_key_value_heads": 2}, _IDS),
    "MistralForCausalLM": _model(
        "MistralForCausalLM", "MistralConfig", SMALL | WORDS | {"num_key_value_heads": 2}, _IDS
    ),
    "Qwen2ForCausalLM": _model("Qwen2ForCausalLM", "Qwen2Config", SMALL | WORDS | {"num_key_value_heads": 2}, _IDS),
    "GemmaForCausalLM": _model(
        "GemmaForCausalLM",
        "GemmaConfig",
        SMALL | WORDS | {"num_key_value_heads": 2, "head_dim": 8},
        _IDS,
        convert=SKIP,
    ),
    "MixtralForCausalLM": _model(
        "MixtralForCausalLM",
        "MixtralConfig",
        SMALL | WORDS | {"num_key_value_heads": 2, "num_local_experts": 4},
        _IDS,
        convert=EXPERTS,
    ),
    "Qwen2MoeForCausalLM": _model(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        SMALL
        | WORDS
        | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 48},
        _IDS,
        convert=EXPERTS,
    ),
    "T5ForConditionalGeneration": _model(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, **WORDS},
        _PAIR,
        convert=SHARE,
    ),
    "BartForConditionalGeneration": _model(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "d_model": 32,
            **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
            **WORDS,
        },
        _PAIR,
        convert=SKIP,
    ),
    "WhisperForConditionalGeneration": _model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 32,
            **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
            "max_source_positions": 8,
            "num_mel_bins": 8,
            "decoder_start_token_id": 1,
            **WORDS,
        },
        {"input_features": lambda batch, _: torch.randn(batch, 8, 16), "decoder_input_ids": _ids},
        full_inputs={"input_features": lambda batch, _: torch.randn(batch, 80, 3000), "decoder_input_ids": _ids},
        convert=SKIP,
    ),
    "ViTForImageClassification": _model(
        "ViTForImageClassification",
        "ViTConfig",
        SMALL | {"image_size": 32, "patch_size": 16},
        _IMAGE,
        full_inputs=_FULL_IMAGE,
    ),
    "CLIPModel": _model(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": SMALL | WORDS,
            "vision_config": SMALL | {"image_size": 32, "patch_size": 16},
            "projection_dim": 16,
        },
        _IMAGE | _IDS,
        full_inputs=_FULL_IMAGE | {"input_ids": lambda batch, _: _ids(batch, 77)},
    ),
    "Dinov2Model": _model(
        "Dinov2Model", "Dinov2Config", SMALL | {"image_size": 32, "patch_size": 16}, _IMAGE, full_inputs=_FULL_IMAGE
    ),
    "MambaForCausalLM": _model(
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4, **WORDS},
        _IDS,
        bypasses_its_layers=True,
        convert=SKIP,
    ),
}

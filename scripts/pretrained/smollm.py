"""SmolLM2-135M and its quality in predicting text: perplexity on two Brown files, calibration text from others.

The package ships the model as GGUF, its Linears rounded to 4 bits; here they are float32 again, so many weights of a
layer are equal to the bit. `scripts/assets.py` fetches model and text.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from assets import ASSETS
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pretrained import brown

GGUF_FILE = ASSETS / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

BLOCK_LAYERS = ["model.layers.*"]  # 210 Linears; the head is tied to the embedding and stays dense
CONTEXT = 384
EVALUATION_FILES = ("ca01", "cg10")
OTHER_FILES = ("ck05", "cr05")  # fiction and humor; the two above are press and belles lettres
CALIBRATION_FILES = tuple(sorted({*brown.EVALUATION_FILES} - {*EVALUATION_FILES, *OTHER_FILES}))

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def load_dense(file: Path = GGUF_FILE) -> nn.Module:
    """Build transformers' LlamaForCausalLM with the file's weights, float32, in eval mode."""
    reader = _reader(file)
    config = _config(reader)
    with torch.device("meta"):  # no random weights: every one is assigned below
        model: nn.Module = LlamaForCausalLM(config)
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        state[_state_name(tensor.name)] = _unpermuted(tensor.name, weight, config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()  # type: ignore[operator]
    rotary = model.model.rotary_emb  # type: ignore[union-attr]
    model.model.rotary_emb = type(rotary)(config)  # type: ignore[union-attr]  # its buffers are in no file
    return model.eval()


@functools.cache
def load_tokenizer(file: Path = GGUF_FILE) -> Tokenizer:
    """Build the tokenizer: byte-level BPE, every digit by itself, no space put in front."""
    reader = _reader(file)
    tokens = {token: number for number, token in enumerate(_field(reader, "tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(tokens, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def brown_tokens(files: Sequence[str]) -> Tensor:
    """Read files of the Brown corpus as one text, and cut its tokens to (n, CONTEXT)."""
    return _contexts([brown.words(file) for file in files])


def _contexts(texts: Sequence[list[str]]) -> Tensor:
    ids = torch.tensor(load_tokenizer().encode(" ".join(word for text in texts for word in text)).ids)
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def calibration(n: int = 64, *, batch_size: int = 8) -> list[dict[str, Tensor]]:
    """Return batches of n contexts, spread evenly over the calibration files."""
    tokens = brown_tokens(CALIBRATION_FILES)
    chosen = tokens[torch.arange(n) * len(tokens) // n]
    return [{"input_ids": batch} for batch in torch.split(chosen, batch_size)]


def tuning(*, batch_size: int = 3) -> list[dict[str, Tensor]]:
    """Return batches of all contexts of the corpus, without the four files of the evaluation."""
    left_out = {*EVALUATION_FILES, *OTHER_FILES}
    tokens = _contexts([words for name, words in brown.corpus().items() if name not in left_out])
    return [{"input_ids": batch} for batch in torch.split(tokens, batch_size)]


def perplexity(
    model: nn.Module,
    *,
    n_contexts: int | None = None,
    batch_size: int = 2,
    files: Sequence[str] = EVALUATION_FILES,
) -> float:
    """Compute exp of the mean loss per predicted token, each context on its own, on these files or their beginning.

    The dense model has 40.45 on all 13 contexts of ca01 and cg10.
    """
    contexts = brown_tokens(files)[:n_contexts]
    total, n_predicted = 0.0, 0
    with torch.inference_mode():
        for ids in torch.split(contexts, batch_size):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += float(nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
            n_predicted += len(logits)
    return math.exp(total / n_predicted)


def _config(reader: GGUFReader) -> LlamaConfig:
    def field(name: str) -> Any:
        return _field(reader, f"llama.{name}")

    return LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
    )


def _reader(file: Path) -> GGUFReader:
    return GGUFReader(file)


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _state_name(name: str) -> str:
    if name.startswith("blk."):
        _, number, part, _ = name.split(".")
        return f"model.layers.{number}.{_NAMES[part]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def _unpermuted(name: str, weight: Tensor, config: LlamaConfig) -> Tensor:
    """Put the rows of q and k into transformers' order: GGUF has both halves of each rotary pair side by side."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    n_heads = heads.get(name.split(".")[-2])
    if n_heads is None:
        return weight
    return weight.view(n_heads, len(weight) // n_heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)

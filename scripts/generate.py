#!/usr/bin/env python
"""Generate text with SmolLM2-135M, dense and sparse: time a token, memory of the weights, and equality of the texts.

    scripts/generate.py --device cuda                          bfloat16, batch 1, a static cache, under a CUDA graph
    scripts/generate.py --device cpu --dtype float32           the same without a graph

The blocks' Linears are pruned by magnitude; decoding is greedy. "masked" is the dense model with the same zeros: sparse
must give its tokens. At the first other token, the table has its distance below the masked model's best logit: a
rounding tie is far less than a logit's own rounding, anything else is a mistake.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

import sparsify
from sparsify.hardware.machine import machine_name
from sparsify.hardware.timing import LoadMeter, disturbance
from sparsify.tables import Table

PROMPT = "The most important thing about a garden is"
ROUNDS = 5


@dataclass
class Generator:
    """A model with a static cache, to generate the same number of tokens again and again; on a GPU from a graph."""

    model: Any  # a causal language model of transformers
    prompt: Tensor  # (1, n)
    n_new: int

    def __post_init__(self) -> None:
        length = self.prompt.shape[1] + self.n_new
        self.cache = StaticCache(config=self.model.config, max_cache_len=length)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=self.prompt.device)
        self._step: Callable[[], object] = self._eager
        if self.prompt.is_cuda:
            self._start()
            self._eager()  # compiles kernels: a capture cannot
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._eager()
            self._step = graph.replay

    def run(self) -> tuple[Tensor, float]:
        """Return the tokens (n_new,) and the seconds of each after the prompt."""
        tokens = torch.empty(self.n_new, dtype=torch.long, device=self.prompt.device)
        self._start()
        tokens[0] = self.token[0, 0]
        self._wait()
        started = time.perf_counter()
        for i in range(1, self.n_new):
            self._step()
            tokens[i] = self.token[0, 0]
        self._wait()
        return tokens.cpu(), (time.perf_counter() - started) / max(self.n_new - 1, 1)

    def _start(self) -> None:
        self.cache.reset()  # type: ignore[no-untyped-call]
        self._choose(self.prompt)

    def _eager(self) -> None:
        self._choose(self.token)

    def _choose(self, ids: Tensor) -> None:
        logits = self.model(input_ids=ids, cache=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def _wait(self) -> None:
        if self.prompt.is_cuda:
            torch.cuda.synchronize()


@torch.inference_mode()
def compare(
    model: nn.Module, prompt: Tensor, sparsity: float, n_new: int, layers: list[str], rounds: int = ROUNDS
) -> list[list[str]]:
    """Time dense, masked and sparse in turns; returns a row each: weights in MB, ms a token, comparison of the text."""
    masked = sparsify.prune(sparsify.convert(copy.deepcopy(model), include=layers), sparsity)
    sparse = sparsify.export(copy.deepcopy(masked), tokens=1)
    models = {"dense": model, "masked": sparsify.to_dense(masked), "sparse": sparse}
    generators = {name: Generator(one, prompt, n_new) for name, one in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    tokens: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, generator in generators.items():
            tokens[name], seconds = generator.run()
            times[name].append(seconds)
    rows = []
    for name, one in models.items():
        n_bytes = sum(tensor.nbytes for tensor in (*one.parameters(), *one.buffers()))
        ms = f"{statistics.median(times[name]) * 1e3:.2f}"
        ratio = f"{statistics.median(times['dense']) / statistics.median(times[name]):.2f}x"
        text = agreement(models["masked"], prompt, tokens["masked"], tokens["sparse"]) if name == "sparse" else ""
        rows.append([f"{sparsity:.0%}", name, f"{n_bytes / 1e6:.2f}", ms, ratio, text])
    return rows


def agreement(masked: nn.Module, prompt: Tensor, expected: Tensor, got: Tensor) -> str:
    """Compare tokens with the masked model's: equal, or the closeness of the first other choice."""
    differ = (expected != got).nonzero().flatten()
    if not len(differ):
        return f"all {len(got)} tokens as masked"
    first = int(differ[0])
    ids = torch.cat([prompt, got[None, :first].to(prompt.device)], 1)
    logits = masked(input_ids=ids).logits[0, -1].float()
    gap = float(logits.max() - logits[got[first]])
    rounding = float(logits.abs().max()) * torch.finfo(next(masked.parameters()).dtype).eps
    return f"{first} tokens as masked, then one {gap:.2g} below the best logit, whose rounding is {rounding:.2g}"


def main() -> None:
    """Print a table for each sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--new-tokens", type=int, default=128)
    options = parser.parse_args()
    from pretrained import smollm  # needs gguf

    watch = LoadMeter()
    model = smollm.load_dense().to(options.device, getattr(torch, options.dtype))
    prompt = torch.tensor([smollm.load_tokenizer().encode(PROMPT).ids], device=options.device)
    head, rows = ("zeros", "", "weights, MB", "ms a token", "times dense", "text"), []
    for sparsity in options.sparsity:
        rows += compare(model, prompt, sparsity, options.new_tokens, smollm.BLOCK_LAYERS)
    print(Table(head, rows).text())
    print(f"{machine_name(torch.device(options.device))}, {options.dtype}; {disturbance(watch.others_cores())}")


if __name__ == "__main__":
    main()

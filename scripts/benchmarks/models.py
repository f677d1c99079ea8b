"""Whole models: dense in torch (float32, bfloat16, int8), and pruned and exported, in turns."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from assets import AssetError, fetch
from pretrained import minilm
from torch import nn
from tqdm import tqdm

from benchmarks import peers, record
from benchmarks.layers import OURS
from sparsify import CSRLinear
from sparsify.cli.model_inputs import make_inputs
from sparsify.cli.models import build_model
from sparsify.hardware.timing import measure
from sparsify.reporting.model_bench import Inputs, run, sparse_copy, typical_tokens

SPARSITIES = (0.5, 0.9)
MINILM = "minilm"
#: name -> batch sizes; MiniLM reads 128 tokens of text, the others images of 224 x 224
MODELS: dict[str, tuple[int, ...]] = {"vit_b_16": (1, 8), "swin_t": (1, 8), "convnext_tiny": (1, 8), MINILM: (32,)}
QUICK: dict[str, tuple[int, ...]] = {"convnext_tiny": (1,)}


@torch.inference_mode()
def bench_models(
    models: dict[str, tuple[int, ...]], sparsities: tuple[float, ...], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate of each model and batch size; the dense ones have sparsity None.

    torchvision's weights are random: the times do not depend on them.
    """
    for name, batches in models.items():
        model, spec = _build(name), f"torchvision:{name}" if name != MINILM else "hf:minilm"
        dense = {"torch fp32": model, "torch bf16": copy.deepcopy(model).bfloat16()}
        if "torch int8" not in peers.absent():
            dense["torch int8"] = peers.quantize(model)
        for batch in tqdm(batches, desc=name):
            inputs = make_inputs(model, spec, batch=batch)
            tokens = typical_tokens(model, inputs)
            candidates: dict[tuple[str, float | None], nn.Module] = {
                (kind, None): m for kind, m in dense.items() if kind != "torch int8" or _runs(m, inputs)
            }
            candidates |= {(OURS, s): sparse_copy(model, s, tokens) for s in sparsities}
            calls = {
                (kind, s): [_call(m, _cast(inputs) if kind == "torch bf16" else inputs)]
                for (kind, s), m in candidates.items()
            }
            for (kind, sparsity), timing in measure(calls, rounds=rounds).items():
                facts = _facts(candidates[kind, sparsity]) if kind == OURS else {}
                yield record.row(kind, timing, model=name, batch=batch, tokens=tokens, sparsity=sparsity, **facts)
        del model, dense, candidates, calls
        gc.collect()


def _build(name: str) -> nn.Module:
    if name == MINILM:
        try:
            fetch(MINILM)
        except AssetError as error:
            raise ValueError(f"{error}; or leave it out: --models vit_b_16 swin_t convnext_tiny") from None
        return minilm.load_dense()
    torch.manual_seed(0)
    return build_model(f"torchvision:{name}")


def _facts(model: nn.Module) -> dict[str, Any]:
    forms = [
        m.form if isinstance(m, CSRLinear) else "dense"
        for m in model.modules()
        if isinstance(m, (CSRLinear, nn.Linear))
    ]
    return {"forms": {form: forms.count(form) for form in sorted(set(forms))}}


def _call(model: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    return lambda: run(model, inputs)


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether a quantized model runs: torch's quantized Linear has a method in the place of its weight."""
    try:
        run(model, inputs)
    except TypeError as error:
        print(f"torch int8 is left out: {error}")
        return False
    return True


def _cast(inputs: Inputs) -> Inputs:
    def cast(value: torch.Tensor) -> torch.Tensor:
        return value.bfloat16() if value.is_floating_point() else value

    if isinstance(inputs, dict):
        return {name: cast(value) for name, value in inputs.items()}
    return tuple(cast(value) for value in inputs)

#!/usr/bin/env python
"""Measure the quality that int8 costs a pruned model, on texts beside the calibration data and on other texts.

    scripts/int8.py                            MiniLM-L6 at 50 and 80%, Wanda's and ALPS' masks, Lee and Brown texts
    scripts/int8.py --model smollm2            SmolLM2-135M at 50%, perplexity
    scripts/int8.py --methods wanda --samples 16

Each pruned model is compared with itself: float32, int8 weights, and int8 weights and inputs. Inputs are rounded by the
definition of the forms that do so, before a product in float32: the bits of no kernel are in these figures.
"""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from pretrained import minilm
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear
from sparsify.kernels.reference import quantize_rows

N_BROWN, BROWN_WORDS = 50, 120
SPARSITIES = {"minilm": (0.5, 0.8), "smollm2": (0.5,)}


def main(argv: Sequence[str] | None = None) -> None:
    """Prune, round and judge, and print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SPARSITIES, default="minilm")
    parser.add_argument("--methods", nargs="+", default=["wanda", "alps"])
    parser.add_argument("--samples", type=int, default=64, help="texts to calibrate on")
    options = parser.parse_args(argv)
    judge, dense, layers, batches = (_minilm if options.model == "minilm" else _smollm)(options.samples)
    for method in options.methods:
        for sparsity in SPARSITIES[options.model]:
            model = sparsify.convert(copy.deepcopy(dense), include=layers)
            sparsify.prune(model, sparsity, method=method, data=batches, progress=True)
            rounded = sparsify.export(model, format="csr", quantize="int8", example=batches[0])
            worst = max(row.int8_error or 0.0 for row in sparsify.report(rounded))
            print(f"{options.model} {method} {sparsity:.0%}: float32 {judge(model)}")
            print(f"  int8 weights {judge(rounded)}, a layer's error at most {worst:.4f}")
            records = [layer.rounding for layer in rounded.modules() if isinstance(layer, CSRLinear) and layer.rounding]
            n_inputs = sum(record.allowed == "int8" for record in records)
            print(
                f"  and inputs of {n_inputs} of {len(records)} layers {judge(with_rounded_inputs(rounded))}", flush=True
            )


def with_rounded_inputs(model: nn.Module) -> nn.Module:
    """Let each layer whose inputs may be int8 see them rounded, in place."""
    for layer in model.modules():
        if isinstance(layer, CSRLinear) and layer.rounding is not None and layer.rounding.allowed == "int8":
            layer.register_forward_pre_hook(lambda _, args: (_rounded(args[0]), *args[1:]))
    return model


def _rounded(x: Tensor) -> Tensor:
    q, step, zero_point = quantize_rows(x)
    return (q.float() - zero_point.unsqueeze(-1)) * step.unsqueeze(-1)


def brown_texts() -> list[str]:
    """Return texts of the Brown corpus, spread over its files; none of them is calibration data of MiniLM."""
    texts = []
    for file in sorted((minilm.MODEL_FOLDER.parent / "brown").iterdir()):
        words = [pair.rpartition("/")[0] for pair in file.read_text().split()]
        texts += [" ".join(words[start : start + BROWN_WORDS]) for start in range(0, len(words), BROWN_WORDS)]
    return texts[:: max(len(texts) // N_BROWN, 1)][:N_BROWN]


def _minilm(n_samples: int) -> tuple[Callable[[nn.Module], str], nn.Module, list[str], list[dict[str, Tensor]]]:
    dense = minilm.load_dense()
    texts = {"Lee": minilm.lee_documents(), "Brown": brown_texts()}
    wanted = {name: minilm.embed(text, dense) for name, text in texts.items()}

    def judge(model: nn.Module) -> str:
        cosines = {name: minilm.mean_cosine(minilm.embed(text, model), wanted[name]) for name, text in texts.items()}
        return ", ".join(f"{name} {cosine:.5f}" for name, cosine in cosines.items())

    return judge, dense, minilm.ENCODER_LAYERS, minilm.calibration_batches(n_samples)


def _smollm(n_samples: int) -> tuple[Callable[[nn.Module], str], nn.Module, list[str], list[dict[str, Tensor]]]:
    from pretrained import smollm  # needs gguf; MiniLM does not

    dense = smollm.load_dense()
    return (
        lambda model: f"perplexity {smollm.perplexity(model):.3f}",
        dense,
        smollm.BLOCK_LAYERS,
        smollm.calibration(n_samples),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

"""Whole models: dense in torch and other engines (float32, bfloat16, int8), and pruned and exported, in turns."""

import copy
import gc
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from assets import AssetError, fetch
from pretrained import minilm
from torch import nn
from tqdm import tqdm
from zoo_models import why_missing, yolo

from benchmarks import record
from benchmarks.layers import INT8, OURS
from sparsify.cli.model_inputs import make_inputs
from sparsify.cli.models import build_model
from sparsify.hardware.timing import Call, measure
from sparsify.layers import PackedLayer
from sparsify.reporting.dense_engines import ENGINES, dense_engines
from sparsify.reporting.fresh_norms import with_settled_norms
from sparsify.reporting.model_bench import sparse_copy, typical_tokens
from sparsify.reporting.model_run import Inputs, run

SPARSITIES = (0.5, 0.9)
#: Our candidate -> options of its export
KINDS: dict[str, dict[str, Any]] = {OURS: {}, INT8: {"quantize": "int8"}}
#: Options of its conversion for CNNS
CNN_OPTIONS: dict[str, Any] = {"types": (nn.Conv2d, nn.Linear)}
TORCH, BF16, CHANNELS_LAST = "torch fp32", "torch bf16", "channels-last torch fp32"
#: Candidates that a run may go without: all but TORCH, with which the others are compared.
CAN_BE_LEFT_OUT = (BF16, CHANNELS_LAST, *ENGINES, *KINDS)
MINILM, BERT = "minilm", "bert_base"
YOLOS = ("yolo11n", "yolo11m")
TEXT = (MINILM, BERT)
CNNS = ("resnet50", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_1_6gf", *YOLOS)
#: name -> options of its conversion beside CNN_OPTIONS
MORE_OPTIONS = dict.fromkeys(YOLOS, yolo.MODELS["yolo11n"].convert)
#: name -> shape of its images, if not 3 x 224 x 224
SHAPES = dict.fromkeys(YOLOS, (3, 640, 640))
#: name -> batch sizes; those of TEXT read 128 tokens of text, the others images
MODELS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("vit_b_16", "swin_t", "convnext_tiny", *CNNS), (1, 8)),
    "yolo11m": (1,),  # eight images take ten minutes
    **dict.fromkeys(TEXT, (32,)),
}
QUICK: dict[str, tuple[int, ...]] = {"convnext_tiny": (1,)}


@torch.inference_mode()
def bench_models(
    models: dict[str, tuple[int, ...]], sparsities: tuple[float, ...], rounds: int, without: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate of each model and batch size; the dense ones have sparsity None.

    The weights of all but MiniLM are random, their BatchNorms settled: the times do not depend on more. All
    convolutions and Linears of CNNS are pruned; their layers are measured on their own inputs. `without` has some of
    CAN_BE_LEFT_OUT: most of a run goes to the files of int8 engines, and to torch bf16 on a processor that lacks its
    instructions.
    """
    for name, batches in models.items():
        if name in YOLOS and (why := why_missing("yolo")):
            print(f"{name} is left out: {why}")
            continue
        model, spec = _build(name), f"hf:{name}" if name in TEXT else f"torchvision:{name}"
        for batch in tqdm(batches, desc=name):
            inputs = make_inputs(model, spec, batch=batch, shape=SHAPES.get(name))
            model = with_settled_norms(model, inputs)
            low = copy.deepcopy(model).bfloat16() if BF16 not in without else None
            tokens = typical_tokens(model, inputs)
            facts: dict[tuple[str, float | None], dict[str, Any]] = {(TORCH, None): {}}
            calls: dict[tuple[str, float | None], list[Call]] = {(TORCH, None): [_call(model, inputs)]}
            if name in CNNS and CHANNELS_LAST not in without:
                facts[CHANNELS_LAST, None] = {}
                calls[CHANNELS_LAST, None] = [_call(*_channels_last(model, inputs))]
            if low is not None:
                facts[BF16, None], calls[BF16, None] = {}, [_call(low, _cast(inputs))]
            with TemporaryDirectory() as folder:
                for engine in dense_engines(model, inputs, Path(folder), without):
                    if engine.call is None:
                        print(f"{name}: {engine.name} is left out: {engine.why}")
                        continue
                    facts[engine.name, None] = {"error": round(engine.error or 0.0, 6), "n_bytes": engine.n_bytes}
                    calls[engine.name, None] = [engine.call]
                kinds = KINDS
                if name in CNNS:
                    kinds = {OURS: {**CNN_OPTIONS, **MORE_OPTIONS.get(name, {}), "example": inputs}}
                for kind, sparsity in [(kind, s) for kind in kinds for s in sparsities if kind not in without]:
                    fast = sparse_copy(model, sparsity, tokens, inputs, **kinds[kind])
                    facts[kind, sparsity], calls[kind, sparsity] = _facts(fast), [_call(fast, inputs)]
                for key, timing in measure(calls, rounds=rounds).items():
                    common = {"model": name, "batch": batch, "tokens": tokens, "sparsity": key[1]}
                    yield record.row(key[0], timing, **common, **facts[key])
            calls.clear()
            gc.collect()


def _build(name: str) -> nn.Module:
    if name == BERT:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        bert: nn.Module = BertModel(BertConfig())
        return bert.eval()
    if name == MINILM:
        try:
            fetch(MINILM)
        except AssetError as error:
            raise ValueError(f"{error}; or leave it out: --models vit_b_16 swin_t convnext_tiny") from None
        return minilm.load_dense()
    torch.manual_seed(0)
    if name in YOLOS:
        detector: nn.Module = yolo.detector(80, name)
        return detector.eval()
    return build_model(f"torchvision:{name}")


def _facts(model: nn.Module) -> dict[str, Any]:
    forms = [
        m.form if isinstance(m, PackedLayer) else "dense"
        for m in model.modules()
        if isinstance(m, (PackedLayer, nn.Linear, nn.Conv2d))
    ]
    return {"forms": {form: forms.count(form) for form in sorted(set(forms))}}


def _call(model: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    return lambda: run(model, inputs)


def _channels_last(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return a copy of a model of images, and its inputs, in the layout in which torch is mostly faster."""
    assert isinstance(inputs, tuple)
    last = torch.channels_last
    return copy.deepcopy(model).to(memory_format=last), tuple(x.contiguous(memory_format=last) for x in inputs)


def _cast(inputs: Inputs) -> Inputs:
    def cast(value: torch.Tensor) -> torch.Tensor:
        return value.bfloat16() if value.is_floating_point() else value

    if isinstance(inputs, dict):
        return {name: cast(value) for name, value in inputs.items()}
    return tuple(cast(value) for value in inputs)

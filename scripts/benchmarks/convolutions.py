"""Single 3x3 convolutions, exported with format="auto", against dense ones of torch, ONNX Runtime and OpenVINO."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sparsify
from benchmarks import engines, peers, record
from benchmarks.layers import OURS
from sparsify.hardware.timing import Call, measure, settle

LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


@dataclass(frozen=True)
class Grid:
    """Layers of as many channels out as in, on square maps; every combination with `images` is measured."""

    cases: tuple[tuple[int, int], ...] = ((64, 56), (128, 28), (256, 14), (512, 14), (512, 7))
    images: tuple[int, ...] = (1, 8)
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    rounds: int = 11


GRIDS = (Grid(), Grid(((64, 56), (512, 7)), (1,), (0.8, 0.9), 3))


@torch.inference_mode()
def run(grid: Grid) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate of each case, at every sparsity it depends on; the dense ones have None.

    Raises RuntimeError if one of them gives a wrong answer.
    """
    cells = [(case, n) for case in grid.cases for n in grid.images]
    for (channels, size), n in tqdm(cells, desc="convolutions"):
        torch.manual_seed(0)
        dense = nn.Conv2d(channels, channels, 3, padding=1).eval()
        x = torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))
        right = F.conv2d(x.double(), dense.weight.double(), dense.bias.double(), padding=1)  # type: ignore[union-attr]
        calls: dict[tuple[str, float | None], list[Call]] = {}
        facts: dict[tuple[str, float | None], dict[str, Any]] = {}
        for name, make in DENSE.items():
            if name in peers.absent():
                continue
            call = make(dense, x)
            peers.check(name, call(), right)
            calls[name, None], facts[name, None] = [call], {}
        for sparsity in grid.sparsities:
            masked: Any = sparsify.convert(nn.Sequential(copy.deepcopy(dense)), types=nn.Conv2d)
            masked = sparsify.prune(masked, sparsity, method="random", seed=0)
            for name, layout in LAYOUTS.items():
                key: tuple[str, float | None] = (f"{OURS} channels {name}", sparsity)
                images = x.contiguous(memory_format=layout)
                settle()
                fast = sparsify.export(masked, example=images)[0]
                facts[key] = {"form": getattr(fast, "form", "dense")}
                calls[key] = [partial(fast, images)]
                weight = masked[0].masked_weight().double()
                pruned = F.conv2d(x.double(), weight, dense.bias.double(), padding=1)  # type: ignore[union-attr]
                peers.check(key[0], calls[key][0](), pruned)
        for of, timing in measure(calls, rounds=grid.rounds).items():
            common = {"channels": channels, "size": size, "images": n, "sparsity": of[1]}
            yield record.row(of[0], timing, **common, **facts[of])


def _torch(layout: torch.memory_format) -> Callable[[nn.Conv2d, Tensor], Call]:
    def make(layer: nn.Conv2d, x: Tensor) -> Call:
        own, images = copy.deepcopy(layer).to(memory_format=layout), x.contiguous(memory_format=layout)
        return lambda: own(images)

    return make


def _onnxruntime(layer: nn.Conv2d, x: Tensor) -> Call:
    import onnx

    node = onnx.helper.make_node("Conv", ["x", "weight", "bias"], ["y"], pads=[1, 1, 1, 1])
    constants = {"weight": layer.weight.numpy(), "bias": layer.bias.numpy()}  # type: ignore[union-attr]
    return engines.onnxruntime_call([node], constants, x, layer.out_channels, x.shape[2:])


def _openvino(layer: nn.Conv2d, x: Tensor) -> Call:
    from openvino import opset13 as op

    parameter = op.parameter(list(x.shape), dtype=np.float32)
    weight, bias = op.constant(layer.weight.numpy()), op.constant(layer.bias.numpy()[None, :, None, None])  # type: ignore[union-attr]
    product = op.convolution(parameter, weight, [1, 1], [1, 1], [1, 1], [1, 1])
    return engines.openvino_call(op.add(product, bias), parameter, x, layer.out_channels, x.shape[2:])


DENSE: dict[str, Callable[[nn.Conv2d, Tensor], Call]] = {
    "torch channels first": _torch(torch.contiguous_format),
    "torch channels last": _torch(torch.channels_last),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def chosen(quick: bool, **changes: Any) -> Grid:
    """Return the grid to measure, with changes that are not None."""
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in changes.items() if v}
    return replace(GRIDS[quick], **given)

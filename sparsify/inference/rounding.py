"""Rounding to int8, judged layer by layer: the change of a layer's outputs decides what of it may be int8."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.layer_inputs import layer_inputs
from sparsify.conversion.converters.table import packed_type
from sparsify.errors import LeftFloatWarning
from sparsify.inference.calibrated_rounding import round_by_inputs
from sparsify.kernels.csr import csr_to_dense, dense_to_csr
from sparsify.kernels.int8 import Rounded, dequantize, quantize
from sparsify.kernels.reference import quantize_rows
from sparsify.layers import MaskedLayer
from sparsify.layers.records import Rounding

#: What `export` may round: weights and, where the form does, inputs; or weights alone.
QUANTIZE = ("int8", "int8-weights")

#: The share of a layer's outputs that rounding may change at most, by default. Of MiniLM's layers at 50%, the worst
#: changes by 0.016, and by 0.010 with inputs as they are.
MAX_ERROR = 0.05

#: The same for inputs. Of the 210 layers of SmolLM2, 95 change by more, up to 0.075, with weights at the nearest
#: values. With the inputs of all layers rounded its perplexity rises by 1.7%, with those of the other 115 by 0.2%.
MAX_INPUT_ERROR = 0.02

#: Rows of input that each layer is judged on, and rounded by, at most.
_MOST_ROWS, _MOST_FITTED = 1024, 4096


class RoundingJudge:
    """Judges for each masked layer of a model what may be int8, by the inputs in one run of an example.

    A layer without inputs there, and every layer without an example, is judged by rows of random numbers. The judge
    rounds too: to the nearest values, or by the layer's inputs in its first call, if three quarters of the rows are at
    least as many as the layer's inputs, and that is better on the last quarter, which is left out for this.
    """

    def __init__(
        self,
        model: nn.Module,
        quantize: str,
        max_error: float,
        example: Any = None,
        max_input_error: float = MAX_INPUT_ERROR,
        *,
        by_inputs: bool = True,
    ) -> None:
        if quantize not in QUANTIZE:
            raise ValueError(f"quantize={quantize!r} is none of: {', '.join(QUANTIZE)}")
        for name, share in (("max_error", max_error), ("max_input_error", max_input_error)):
            if not share >= 0:
                raise ValueError(f"{name} must be at least 0, got {share}")
        self.quantize, self.max_error, self.max_input_error = quantize, max_error, max_input_error
        self._by_inputs = by_inputs
        self._squares: dict[nn.Module, Tensor] = {}
        self._rounded: dict[nn.Module, Rounded | None] = {}
        self.inputs = {} if example is None else layer_inputs(model, example, self._add)

    def judge(self, layer: MaskedLayer, tokens: int) -> Rounding:
        """Return the record of a layer; tokens: random rows for a layer without an input in the example."""
        on_example = layer in self._squares
        if not on_example:
            x = torch.randn(layer.input_shape(tokens), generator=torch.Generator().manual_seed(0), device="cpu")
            self._rounded[layer] = _nearest(*_weight_and_mask(layer))
            self._add(layer, x.to(layer.weight))
        outputs, by_weights, by_inputs = self._squares.pop(layer).tolist()
        weights, inputs = _relative(by_weights, outputs), _relative(by_inputs, outputs)
        asked = inputs if self.quantize == "int8" else None
        return Rounding(weights, asked, self.max_error, on_example, self.max_input_error)

    def take(self, layer: nn.Module) -> Rounded | None:
        """Return the int8 values of a judged layer, and forget them; None if it has none."""
        return self._rounded.pop(layer, None)

    @torch.no_grad()
    def _add(self, layer: nn.Module, x: Tensor) -> None:
        """Add up the squares of a layer's products with these inputs, and of their changes by rounding."""
        assert isinstance(layer, MaskedLayer)
        if packed_type(layer) is None:
            return
        if x.is_nested:
            x = torch.cat(x.unbind())
        rows = layer.rows(x).detach().reshape(-1, layer.shape[1]).float()
        weight, mask = _weight_and_mask(layer)
        if layer not in self._rounded:
            fits = self._by_inputs and layer.input_groups == 1
            self._rounded[layer], rows = _better(weight, mask, rows) if fits else (_nearest(weight, mask), rows)
        rows = _some(rows)
        rounded = _as_float(self._rounded[layer], weight, mask)
        outputs = rows @ weight.T
        by_weights = rows @ (rounded - weight).T
        by_inputs = _rounded_rows(rows) @ rounded.T - outputs
        squares = torch.stack([part.double().square().sum() for part in (outputs, by_weights, by_inputs)]).cpu()
        self._squares[layer] = self._squares.get(layer, 0) + squares


def _relative(change: float, outputs: float) -> float:
    """Return the relative size of a change; both are sums of squares."""
    if change == 0:
        return 0.0
    return math.sqrt(change / outputs) if outputs else math.inf


def warn_left_float(roundings: Mapping[str, Rounding]) -> None:
    """Name the layers that stay as they are in one LeftFloatWarning."""
    left = {name: rounding for name, rounding in roundings.items() if not rounding.allowed}
    if left:
        name, rounding = max(left.items(), key=lambda item: item[1].by_weights)
        shown = ", ".join(key or "(root)" for key in [*left][:3]) + (
            f" and {len(left) - 3} more" if len(left) > 3 else ""
        )
        warnings.warn(
            f"{shown}: left as they are; int8 weights would change the outputs of {name or '(root)'} by "
            f"{rounding.by_weights:.3g} of their size, and max_error={rounding.limit:g}; "
            "raise max_error to round them all the same",
            LeftFloatWarning,
            stacklevel=3,
        )


def _weight_and_mask(layer: MaskedLayer) -> tuple[Tensor, Tensor]:
    return layer.matrix(layer.masked_weight()).detach().float(), layer.matrix(layer.mask)


def _better(weight: Tensor, mask: Tensor, rows: Tensor) -> tuple[Rounded | None, Tensor]:
    """Round a weight to the nearest values, or by its inputs where that is better; return the rows to judge it on."""
    nearest, n_fitted = _nearest(weight, mask), min(len(rows) * 3 // 4, _MOST_FITTED)
    if nearest is None or n_fitted < weight.shape[1] or not bool(rows.isfinite().all()):
        return nearest, rows
    held_out = rows[n_fitted:]
    candidates = nearest, round_by_inputs(weight, mask, rows[:n_fitted])
    changes = [_some(held_out) @ (_as_float(rounded, weight, mask) - weight).T for rounded in candidates]
    return candidates[int(changes[1].norm() < changes[0].norm())], held_out


def _some(rows: Tensor) -> Tensor:
    """Return at most _MOST_ROWS rows, evenly spread."""
    return rows[:: -(-len(rows) // _MOST_ROWS) or 1]


def _nearest(weight: Tensor, mask: Tensor) -> Rounded | None:
    """Round a weight to the nearest values; None if it has no int8 form."""
    try:
        csr, scale = quantize(dense_to_csr(weight, mask), len(weight))
    except ValueError:
        return None
    return Rounded(csr.values, scale)


def _as_float(rounded: Rounded | None, weight: Tensor, mask: Tensor) -> Tensor:
    """Return a weight as its int8 values stand for it; NaN if it has none."""
    if rounded is None:
        return torch.full_like(weight, math.nan)
    csr = dense_to_csr(weight, mask)._replace(values=rounded.values)
    return csr_to_dense(dequantize(csr, rounded.scale, torch.float32), (weight.shape[0], weight.shape[1]))[0]


def _rounded_rows(rows: Tensor) -> Tensor:
    """Return inputs as the forms that quantize them see them."""
    q, step, zero_point = quantize_rows(rows)
    return (q.float() - zero_point.unsqueeze(-1)) * step.unsqueeze(-1)

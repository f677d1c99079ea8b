"""Which form a layer gets: measured here and now, against the dense layer, for the number of tokens asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsify.kernels import FORMS, supports
from sparsify.kinds import masked_as
from sparsify.layers import Masked, Packed
from sparsify.machine import machine_name
from sparsify.timing import measure

#: Rounds in which each candidate is timed once, and the time each gets in a round.
N_ROUNDS, SAMPLE_S = 7, 2e-3

#: A sparse form must beat dense by this much: less is within the noise of the measurement.
MARGIN = 0.97


@dataclass(frozen=True)
class Choice:
    """A form, "dense" among them, and why: the median microseconds of every candidate for `tokens` rows of input."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # in a file, an unknown key is an error

    form: str
    tokens: int
    times_us: Mapping[str, float]
    machine: str

    @property
    def reason(self) -> str:
        """Say in a few words why this form was chosen.

        >>> Choice("panel", 64, {"dense": 300.0, "panel": 60.0}, "a machine").reason
        '5.00x dense for 64 tokens (60 of 300 us)'
        """
        if not self.times_us:
            return "asked for"
        dense = self.times_us["dense"]
        others = [(t, form) for form, t in self.times_us.items() if form != "dense"]
        if self.form != "dense":
            ours = self.times_us[self.form]
            return f"{dense / ours:.2f}x dense for {self.tokens} tokens ({ours:.0f} of {dense:.0f} us)"
        if not others:
            return "no sparse kernel runs here; see sparsify doctor"
        time_us, form = min(others)
        return f"sparse is no faster for {self.tokens} tokens: {form} {dense / time_us:.2f}x dense"


class Chooser:
    """Measures layers one by one, each kind (type, shape, dtype, device, bias, kept weights in percent, input) once."""

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.tokens = tokens
        self._known: dict[object, Choice] = {}

    @torch.inference_mode()
    def choose(self, layer: Masked, given: Tensor | None = None) -> Choice:
        """Return the fastest form for a layer, "dense" unless another beats it by the margin.

        given: a tensor of the shape and layout of its input, on any device; else `tokens` rows of input.
        """
        shape = layer.input_shape(self.tokens) if given is None else tuple(given.shape)
        strides = None if given is None else given.stride()
        weight, bias = layer.weight, layer._parameters.get("bias")
        sparsity = round(100 * layer.sparsity)
        kind = (type(layer), layer.shape, weight.dtype, weight.device, bias is None, sparsity, shape, strides)
        if kind not in self._known:
            # A stride of 0 is an expanded tensor, which takes no values.
            x = torch.empty(shape) if strides is None or 0 in strides else torch.empty_strided(shape, strides)
            x.normal_(generator=torch.Generator().manual_seed(0))  # the user's random numbers are not ours to draw
            times = self._measure(layer, x.to(weight))
            best = min(times, key=lambda form: times[form])
            form = best if times[best] < MARGIN * times["dense"] else "dense"
            self._known[kind] = Choice(form, x.numel() // max(layer.shape[1], 1), times, machine_name())
        return self._known[kind]

    def _measure(self, layer: Masked, x: Tensor) -> dict[str, float]:
        """Time dense, and every form that has a fast kernel here and takes less memory, in turns, on an input.

        Return medians in us.
        """
        forms = [form for form in FORMS if form != "csr" and supports(form, x.device, x.dtype)]
        candidates = {form: exported_as(layer, form) for form in ("dense", *forms)}
        calls = {
            form: [_call(module, x)]
            for form, module in candidates.items()
            if not isinstance(module, Packed) or _n_bytes(module.parts) < _n_bytes([layer.weight])
        }
        timings = measure(calls, rounds=N_ROUNDS, sample_s=SAMPLE_S)
        return {form: timing.median_s * 1e6 for form, timing in timings.items()}


def exported_as(layer: Masked, form: str) -> nn.Module:
    """Make what a masked layer is exported as in a form; "dense" is the layer it was, with zeros."""
    kind = masked_as(layer)
    if form != "dense":
        return kind.packed.from_sparse(layer, form=form)
    dense = kind.to_dense(layer)
    dense.weight = nn.Parameter(layer.masked_weight().detach(), requires_grad=layer.weight.requires_grad)
    return dense


def _call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module.forward(x)


def _n_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

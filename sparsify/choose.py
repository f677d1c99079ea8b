"""Which form a layer gets: measured here and now, against the dense layer, for the number of tokens asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.formats import CSR, dense_to_csr
from sparsify.kernels import FORMS, linear, pack, supports
from sparsify.layers import Masked
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
    """Measures layers one by one, each kind (shape, dtype, device, bias, kept weights in percent) only once."""

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.tokens = tokens
        self._known: dict[object, Choice] = {}

    @torch.inference_mode()
    def choose(self, layer: Masked) -> Choice:
        """Return the fastest form for a layer, "dense" unless another beats it by the margin."""
        weight, mask = layer.weight_matrix, layer.matrix(layer.mask)
        kind = (
            weight.shape,
            weight.dtype,
            weight.device,
            layer._parameters.get("bias") is None,
            round(100 * layer.sparsity),
        )
        if kind not in self._known:
            csr = dense_to_csr(weight, mask)
            times = self._measure(layer.matrix(layer.masked_weight()), csr, layer._parameters.get("bias"))
            best = min(times, key=lambda form: times[form])
            form = best if times[best] < MARGIN * times["dense"] else "dense"
            self._known[kind] = Choice(form, self.tokens, times, machine_name())
        return self._known[kind]

    def _measure(self, dense: Tensor, csr: CSR, bias: Tensor | None) -> dict[str, float]:
        """Time dense, and every form that has a fast kernel here and takes less memory, in turns.

        Return medians in us.
        """
        shape = (dense.shape[0], dense.shape[1])
        generator = torch.Generator().manual_seed(0)  # the user's random numbers are not ours to draw
        x = torch.randn(self.tokens, shape[1], generator=generator).to(dense)
        calls: dict[str, Callable[[], object]] = {"dense": lambda: F.linear(x, dense, bias)}
        for form in FORMS:
            if form != "csr" and supports(form, dense.device, dense.dtype):
                parts = pack(form, csr, shape)
                if sum(part.numel() * part.element_size() for part in parts) < dense.numel() * dense.element_size():
                    calls[form] = _call(x, parts, form, shape, bias)
        timings = measure({form: [call] for form, call in calls.items()}, rounds=N_ROUNDS, sample_s=SAMPLE_S)
        return {form: timing.median_s * 1e6 for form, timing in timings.items()}


def _call(
    x: Tensor, parts: tuple[Tensor, ...], form: str, shape: tuple[int, int], bias: Tensor | None
) -> Callable[[], object]:
    return lambda: linear(x, parts, form, shape, bias)

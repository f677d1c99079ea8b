"""Selection of the form of each layer: measured here and now, against the dense layer, for a number of tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparsify.conversion.converters.table import converter_of_layer, packed_type
from sparsify.hardware import gpu_timing
from sparsify.hardware.machine import last_level_cache_bytes, machine_name
from sparsify.hardware.timing import Call, LoadMeter, measure, measure_cold
from sparsify.inference.followers import Followed
from sparsify.kernels import FORMS, INT8_FORMS, fits, quantizes_inputs, supports
from sparsify.kernels.csr import dense_to_csr
from sparsify.kernels.int8 import Rounded
from sparsify.layers import MaskedLayer, PackedLayer
from sparsify.layers.fused_block import FusedCall
from sparsify.layers.records import MARGIN, FormChoice

#: Rounds in which each candidate is timed once, and the time each gets in a round.
N_ROUNDS, SAMPLE_S = 7, 2e-3

#: A form so many times slower than another after two rounds is not timed again: a neighbour slows one by 1.5 or 2.
HOPELESS = 3.0
#: Rows of input from which a quarter of as many come first.
MANY_ROWS = 4096

#: With more cores than this busy with other processes a layer is measured again, up to so many times in all. The clock
#: of processes ticks every 10 ms, so less than a quarter of a core is within its error.
BUSY_CORES, N_TRIES = 0.25, 2

#: A dense convolution on images with channels last, for which it is mostly faster. Where images may have that layout,
#: dense is the better of both.
_DENSE_LAST = "dense, channels last"

#: What a choice looks at first. "speed": the fastest form, of those as fast (within the margin) the smallest, and dense
#: unless it is beaten by the margin. "memory": the smallest form, however fast, of several the fastest.
PREFERENCES = ("speed", "memory")


def why_chosen(choice: FormChoice, weight: Tensor) -> str:
    """Return the reason for a layer's form, in a few words, given its weight."""
    alone = set(choice.times_us) == {"dense"}
    if alone and any(form != "csr" and supports(form, weight.device, weight.dtype) for form in FORMS):
        return "no sparse form is smaller than dense at this sparsity"
    return choice.reason


class FormSelector:
    """Measures layers one by one, each distinct layer once.

    Layers are alike with the same type, shape, dtype, device, bias or none, kept weights in percent, fitting forms,
    input and permission to round.
    """

    def __init__(self, tokens: int, prefer: str = "speed", *, may_be_dense: bool = True, model_bytes: int = 0) -> None:
        """Make a selector without measurements.

        tokens: rows of input. may_be_dense: False to choose a form of int8 values wherever rounding is allowed.
        model_bytes: dense bytes of all weights that take turns with a layer's; a candidate finds its weight in the
        last-level cache only if theirs, as small as the candidate is, have room there too.
        """
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        if prefer not in PREFERENCES:
            raise ValueError(f"prefer={prefer!r} is none of: {', '.join(PREFERENCES)}")
        self.tokens, self.prefer, self.may_be_dense, self.model_bytes = tokens, prefer, may_be_dense, model_bytes
        self._known: dict[object, FormChoice] = {}
        self._others_cores: dict[int, float] = {}

    @torch.inference_mode()
    def choose(
        self, layer: MaskedLayer, given: Tensor | None = None, rounded: str = "", steps: FusedCall | None = None
    ) -> FormChoice:
        """Return the form for a layer: see PREFERENCES.

        given: a tensor of the shape and layout of its input, on any device; else `tokens` rows of input.
        rounded: "int8" for forms of int8 values, "int8-weights" for those of them that leave inputs as they are.
        steps: what follows the layer; each candidate is measured with it.
        """
        packed_as = packed_type(layer)
        if packed_as is None:
            return FormChoice("dense", self.tokens, {}, machine_name(layer.weight.device))
        shape = layer.input_shape(self.tokens) if given is None else tuple(given.shape)
        strides = None if given is None else given.stride()
        weight, bias = layer.weight, layer._parameters.get("bias")
        sparsity = round(100 * layer.sparsity)
        csr = dense_to_csr(layer.weight_matrix, layer.matrix(layer.mask))
        here = _forms_here(weight, rounded)
        if rounded and not here:
            return FormChoice("csr", self.tokens, {}, machine_name(weight.device))
        settings = layer.settings_of(layer)
        forms = tuple(
            f for f in here if fits(f, csr, layer.shape) and (rounded or packed_as.worth_measuring(f, settings))
        )
        converter = (
            type(layer),
            str(settings),
            layer.shape,
            weight.dtype,
            weight.device,
            bias is None,
            sparsity,
            forms,
            shape,
            strides,
            bool(rounded),
            steps and (steps.norm is None, steps.activation),
        )
        if converter not in self._known:
            # A stride of 0 is an expanded tensor, which takes no values.
            x = torch.empty(shape, device="cpu")
            if strides is not None and 0 not in strides:
                x = torch.empty_strided(shape, strides, device="cpu")
            x.normal_(generator=torch.Generator().manual_seed(0))  # the user's random numbers are not ours to draw
            candidates = _candidates(layer, forms, quantized=bool(rounded))
            followed = {form: m if steps is None else Followed(m, steps) for form, m in candidates.items()}
            may_be_last = given is None or not x.is_contiguous()
            if may_be_last and isinstance(layer, nn.Conv2d) and x.dim() == 4 and weight.is_cpu:
                followed[_DENSE_LAST] = copy.deepcopy(followed["dense"]).to(memory_format=torch.channels_last)
            times, others_cores = self._measure_quietly(followed, x.to(weight))
            if _DENSE_LAST in times:
                times["dense"] = min(times["dense"], times.pop(_DENSE_LAST))
            n_bytes = {form: _n_bytes(module) for form, module in candidates.items()}
            packed = {form: time for form, time in times.items() if form != "dense"}
            only_packed = bool(rounded and packed) and not self.may_be_dense
            form = _best(packed if only_packed else times, n_bytes, self.prefer)
            tokens = x.numel() // max(getattr(layer, "in_channels", layer.shape[1]), 1)
            self._known[converter] = FormChoice(form, tokens, times, machine_name(weight.device))
            self._others_cores[id(self._known[converter])] = others_cores
        return self._known[converter]

    def others_cores(self, choice: FormChoice) -> float:
        """Return the cores busy with other processes while a choice of this selector was measured; 0 if few were."""
        return self._others_cores.get(id(choice), 0.0)

    @torch.inference_mode()
    def times(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Time some calls in turns, once more if the machine is busy; medians in us."""
        best: dict[str, float] = {}
        for _ in range(N_TRIES):
            watch = LoadMeter()
            timings = measure({name: [call] for name, call in calls.items()}, rounds=N_ROUNDS, sample_s=SAMPLE_S)
            times = {name: timing.median_s * 1e6 for name, timing in timings.items()}
            best = {name: min(time, best.get(name, time)) for name, time in times.items()}
            if watch.others_cores() <= BUSY_CORES:
                break
        return best

    def _measure_quietly(self, candidates: Mapping[str, nn.Module], x: Tensor) -> tuple[dict[str, float], float]:
        """Measure again if the machine is busy, and take the shorter times; also return the cores still busy."""
        best: dict[str, float] = {}
        busy = 0.0
        for _ in range(N_TRIES):
            watch = LoadMeter()
            times = self._measure(candidates, x)
            best = {form: min(time, best.get(form, time)) for form, time in times.items()}
            if (busy := watch.others_cores()) <= BUSY_CORES or len(candidates) == 1:
                return best, 0.0
        return best, busy

    def _measure(self, candidates: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
        """Time the candidates of a layer in turns, on an input: medians in us. A GPU finds no weight in its cache.

        Of many rows of input a CPU first takes some, and leaves out what is hopeless there.
        """
        if isinstance(candidates["dense"], nn.Linear) and not x.is_cuda and x.numel() > MANY_ROWS * x.shape[-1]:
            candidates = _promising(candidates, x.flatten(0, -2)[: MANY_ROWS // 4])
        calls = {form: [_call(module, x)] for form, module in candidates.items() if form != _DENSE_LAST}
        if _DENSE_LAST in candidates:
            calls[_DENSE_LAST] = [_call(candidates[_DENSE_LAST], x.contiguous(memory_format=torch.channels_last))]
        if x.is_cuda:
            for form, module in candidates.items():
                n = gpu_timing.n_copies(_n_bytes(module), x.device)
                calls[form] += [_call(copy.deepcopy(module), x) for _ in range(n - 1)]
            timings = gpu_timing.measure_replays(calls, x.device, rounds=N_ROUNDS, sample_s=SAMPLE_S)
        else:
            large = self._too_large(candidates)
            cold = {name: call for name, [call] in calls.items() if name in large}
            warm = {name: group for name, group in calls.items() if name not in cold}
            timings = measure(warm, rounds=N_ROUNDS, sample_s=SAMPLE_S, hopeless=HOPELESS)
            timings |= measure_cold(cold, last_level_cache_bytes(), rounds=N_ROUNDS) if cold else {}
        return {form: timing.median_s * 1e6 for form, timing in timings.items()}

    def _too_large(self, candidates: Mapping[str, nn.Module]) -> list[str]:
        """Return the candidates whose weight comes from memory each time."""
        share = self.model_bytes / max(_n_bytes(candidates["dense"]), 1)
        return [form for form, module in candidates.items() if share * _n_bytes(module) > last_level_cache_bytes()]


def _forms_here(weight: Tensor, rounded: str) -> list[str]:
    """Return the forms to measure for a weight: those with kernels here."""
    if not rounded:
        return [form for form in FORMS if form != "csr" and supports(form, weight.device, weight.dtype)]
    known = [form for form in INT8_FORMS if supports(form, weight.device, weight.dtype, quantized=True)]
    return [form for form in known if rounded == "int8" or not quantizes_inputs(form)]


def _candidates(layer: MaskedLayer, forms: Iterable[str], *, quantized: bool = False) -> dict[str, nn.Module]:
    """Make the dense layer, and a layer in each form with less memory than dense."""
    packed = {form: exported_as(layer, form, quantized=quantized) for form in forms}
    return {
        "dense": exported_as(layer, "dense"),
        **{form: module for form, module in packed.items() if _n_bytes(module) < layer.weight.nbytes},
    }


def _best(times: Mapping[str, float], n_bytes: Mapping[str, int], prefer: str) -> str:
    """Choose a form as PREFERENCES says.

    >>> _best({"dense": 9.0, "tiles": 10.0, "narrow": 12.0}, {"dense": 100, "tiles": 60, "narrow": 70}, "speed")
    'dense'
    >>> _best({"dense": 9.0, "tiles": 10.0, "narrow": 12.0}, {"dense": 100, "tiles": 60, "narrow": 70}, "memory")
    'tiles'
    """
    if prefer == "memory":
        return min(times, key=lambda form: (n_bytes.get(form, 0), times[form]))
    fastest, enough = min(times.values()), MARGIN * times.get("dense", math.inf)
    if fastest >= enough:
        return "dense"
    close = [form for form, time in times.items() if MARGIN * time <= fastest and time < enough]
    return min(close, key=lambda form: (n_bytes.get(form, 0), times[form]))


def exported_as(layer: MaskedLayer, form: str, *, quantized: bool = False, rounded: Rounded | None = None) -> nn.Module:
    """Make the exported layer of a masked layer in a form; "dense" is the layer before `convert`, with zeros.

    quantized: with int8 values, these if they are given; not for "dense".
    """
    if form != "dense":
        packed = packed_type(layer)
        assert packed is not None
        return packed.from_sparse(layer, form=form, quantized=quantized, rounded=rounded)
    zeroed = copy.copy(layer)  # the layer itself may be in a schedule that brings its masked values back
    weight = nn.Parameter(layer.masked_weight().detach(), requires_grad=layer.weight.requires_grad)
    zeroed._parameters = {**layer._parameters, "weight": weight}
    return converter_of_layer(layer).to_dense(zeroed)


def _promising(candidates: Mapping[str, nn.Module], x: Tensor) -> dict[str, nn.Module]:
    """Return dense, the fastest packed layer, and all others that are not hopeless on an input."""
    calls = {form: [_call(module, x)] for form, module in candidates.items()}
    times = {form: timing.median_s for form, timing in measure(calls, rounds=2, sample_s=SAMPLE_S).items()}
    best = min((form for form in times if form != "dense"), key=times.__getitem__, default="dense")
    limit = HOPELESS * min(times.values())
    return {form: module for form, module in candidates.items() if form in ("dense", best) or times[form] < limit}


def _call(module: nn.Module, x: Tensor) -> Call:
    return lambda: module.forward(x)


def _n_bytes(module: nn.Module) -> int:
    """Return the memory of the weight."""
    module = module.layer if isinstance(module, Followed) else module
    tensors: Iterable[Tensor] = module.tensors if isinstance(module, PackedLayer) else [module.weight]  # type: ignore[list-item]
    return sum(tensor.nbytes for tensor in tensors)

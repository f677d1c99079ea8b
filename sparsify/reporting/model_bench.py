"""Times of a model, dense against pruned and exported, whole and by layer."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from sparsify.conversion.convert import convert
from sparsify.conversion.converters.table import matrices
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.hardware.machine import machine_name
from sparsify.hardware.timing import LoadMeter, Timing, disturbance, measure
from sparsify.inference.export import export
from sparsify.layers import PackedLayer
from sparsify.pruning.prune import prune
from sparsify.reporting.dense_engines import dense_engines
from sparsify.reporting.fresh_norms import settle_norms, with_settled_norms
from sparsify.reporting.model_run import Inputs, run
from sparsify.reporting.report import report
from sparsify.tables import Listed, Listing, Table

#: Runs of the whole model to time each layer in.
N_LAYER_ROUNDS = 5


@dataclass(frozen=True)
class LayerBench:
    """One Linear inside the running model, microseconds per run of the model.

    The times are None for a layer without a call as a module: attention reads the weight of its children itself.
    """

    name: str
    shape: tuple[int, int]
    tokens: int | None
    form: str
    dense_us: float | None
    sparse_us: float | None
    reason: str


@dataclass(frozen=True)
class EngineBench:
    """The dense model in another engine: its time, and its error against torch's float32; or why there is none."""

    name: str
    time: Timing | None
    error: float | None
    why: str


@dataclass(frozen=True)
class ModelBench(Listed):
    """A dense model and its sparse copy; `str()` of it is a table for people.

    tokens: rows of input in the measurement of forms. others_cores: number of cores busy with other processes.
    engines: other dense engines, empty if they were not asked for.
    """

    sparsity: float
    tokens: int
    machine: str
    dense: Timing
    sparse: Timing
    layers: tuple[LayerBench, ...]
    others_cores: float
    engines: tuple[EngineBench, ...] = ()

    @property
    def speedup(self) -> float:
        """Time of the dense model divided by that of the sparse model."""
        return self.dense.median_s / self.sparse.median_s

    def listing(self) -> Listing:
        """Return the times of the whole model, and a table of its layers."""
        head = ("layer", "shape", "tokens", "form", "dense us", "sparse us", "times", "why")
        lines: list[tuple[str, ...]] = []
        for x in self.layers:
            shape = f"{x.shape[0]}x{x.shape[1]}"
            if x.dense_us is None or x.sparse_us is None:
                lines.append(
                    (x.name or "(root)", shape, "-", x.form, "-", "-", "-", x.reason or "not called by itself")
                )
                continue
            numbers = (f"{x.dense_us:.0f}", f"{x.sparse_us:.0f}", f"{x.dense_us / x.sparse_us:.2f}x")
            lines.append((x.name or "(root)", shape, str(x.tokens), x.form, *numbers, x.reason))
        summary = (
            f"{self.speedup:.2f}x dense at sparsity {self.sparsity:g}, forms measured for {self.tokens} tokens",
            f"dense   {self.dense}",
            f"sparse  {self.sparse}",
            *self._engine_lines(),
            f"{self.machine}; {disturbance(self.others_cores)}",
        )
        table = Table(head, lines, left=("form", "why"), spare=("tokens", "shape", "form"))
        return Listing(summary, [("microseconds of each layer in one run of the model", table)])

    def _engine_lines(self) -> Iterator[str]:
        """Tell the time of each other dense engine, and whether one is faster than torch's float32."""
        for engine in self.engines:
            if engine.time is None:
                yield f"{engine.name}: not measured: {engine.why}"
                continue
            times = engine.time.median_s / self.sparse.median_s
            yield f"{engine.name}  {engine.time}, error {engine.error:.2g}; sparse is {times:.2f}x as fast"
        faster = [x for x in self.engines if x.time is not None and x.time.median_s < self.dense.median_s]
        for kind in ("float32", "int8"):  # the fastest of each kind
            best = min((x for x in faster if x.name.endswith(kind)), key=_median, default=None)
            if best is not None:
                times = self.dense.median_s / _median(best)
                yield (
                    f"torch's float32, which 'auto' compares with, is not the fastest: "
                    f"{best.name} is {times:.2f}x as fast"
                )


def sparse_copy(
    model: nn.Module,
    sparsity: float,
    tokens: int,
    inputs: Inputs,
    *,
    quantize: str | None = None,
    example: Any = None,
    **conversion: Any,
) -> nn.Module:
    """Prune a copy of a model by magnitude, the same in each layer, and export it for `tokens` rows of input.

    BatchNorms that never saw a batch get the statistics of the pruned model on `inputs`.

    example: an input of the model, for layers to be measured on their own inputs.
    """
    masked = settle_norms(prune(convert(copy.deepcopy(model), **conversion), sparsity), inputs)
    return export(masked, tokens=tokens, example=example, quantize=quantize, copy=False)


@torch.inference_mode()
def bench(
    model: nn.Module,
    inputs: Inputs,
    sparsity: float,
    *,
    rounds: int = 11,
    tied: str = "error",
    functional: bool = False,
    engines: bool = False,
) -> ModelBench:
    """Measure a model against its copy pruned to `sparsity`, on these inputs, with torch's threads.

    tied and functional as for `convert`. engines: measure the dense model in torch's int8, ONNX Runtime and OpenVINO
    too, as far as they are installed and take it. The model stays as it was.

    Raises ValueError if the model runs no Linear on these inputs.
    """
    watch = LoadMeter()
    model = with_settled_norms(model, inputs)
    tokens = typical_tokens(model, inputs)
    fast = sparse_copy(model, sparsity, tokens, inputs, tied=tied, functional=functional)
    calls = {"dense": [lambda: run(model, inputs)], "sparse": [lambda: run(fast, inputs)]}
    with TemporaryDirectory() as folder:
        others = list(dense_engines(model, inputs, Path(folder))) if engines else []
        times = measure(calls | {x.name: [x.call] for x in others if x.call is not None}, rounds=rounds)
    layers = _bench_layers(model, fast, inputs)
    found = tuple(EngineBench(x.name, times.get(x.name), x.error, x.why) for x in others)
    return ModelBench(
        sparsity, tokens, machine_name(), times["dense"], times["sparse"], layers, watch.others_cores(), found
    )


@torch.inference_mode()
def typical_tokens(model: nn.Module, inputs: Inputs) -> int:
    """Return the rows of input of a Linear: the median over the model, weighted by multiplications.

    Raises ValueError if the model calls no Linear.
    """
    with _timed(model) as (_, tokens):
        run(model, inputs)
    work = sorted((n, n * matrices(model.get_submodule(name))[""].numel()) for name, n in tokens.items())
    if not work:
        raise ValueError("the model called none of its Linears on these inputs: there is nothing to compare")
    total, done = sum(w for _, w in work), 0
    for n, w in work:
        done += w
        if 2 * done >= total:
            return n
    raise AssertionError("half of the work is reached by all of it")


def _median(engine: EngineBench) -> float:
    assert engine.time is not None
    return engine.time.median_s


def _bench_layers(model: nn.Module, fast: nn.Module, inputs: Inputs) -> tuple[LayerBench, ...]:
    times: dict[str, dict[str, list[float]]] = {"dense": defaultdict(list), "sparse": defaultdict(list)}
    tokens: dict[str, int] = {}
    for _ in range(N_LAYER_ROUNDS):
        for kind, timed in (("dense", model), ("sparse", fast)):
            with _timed(timed) as (seconds, rows_seen):
                run(timed, inputs)
            tokens |= rows_seen
            for name, s in seconds.items():
                times[kind][name].append(1e6 * s)
    rows = []
    for row in report(fast):
        dense, sparse = (times[kind].get(row.name) for kind in ("dense", "sparse"))
        rows.append(
            LayerBench(
                row.name,
                row.shape,
                tokens.get(row.name),
                row.format,
                round(median(dense), 1) if dense else None,
                round(median(sparse), 1) if sparse else None,
                row.reason,
            )
        )
    return tuple(rows)


@contextmanager
def _timed(model: nn.Module) -> Iterator[tuple[dict[str, float], dict[str, int]]]:
    """Add up seconds and rows of input of every called Linear, by name, inside the context."""
    seconds: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    started: dict[str, float] = {}
    handles = []
    for name, layer in layers_of_type(model, nn.Module).items():
        if not isinstance(layer, PackedLayer) and "" not in matrices(layer):
            continue

        def before(_: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
            tokens[name] += arguments[0].shape[:-1].numel() if arguments else 0
            started[name] = time.perf_counter()

        def after(_: nn.Module, arguments: Any, output: Any, name: str = name) -> None:
            seconds[name] += time.perf_counter() - started[name]

        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield seconds, tokens
    finally:
        for handle in handles:
            handle.remove()

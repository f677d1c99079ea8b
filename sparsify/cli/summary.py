"""The end of `sparsify compress`: size, share, speed, and the lines that load the file."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsify.cli.evaluation import Qualities, quality_table
from sparsify.cli.model_inputs import check_inputs, describe, make_inputs
from sparsify.cli.options import given_inputs, inputs_of
from sparsify.reporting.model_run import Inputs
from sparsify.reporting.model_speed import ModelSpeed
from sparsify.reporting.report import Report

#: A run of the model that takes longer is not repeated for a measurement that nobody asked for, in seconds.
LONGEST_RUN_S = 5.0


@dataclass(frozen=True)
class Compressed:
    """The result of a compression.

    report: of the layers. quality: before ("dense") and after ("sparse"), if measured.
    dense_bytes: of the model's tensors before, None if it was never in memory.
    speed: of the whole model on `inputs`, None with the reason in why_no_speed.
    loader: the lines of Python that load the file.
    """

    report: Report
    quality: dict[str, Qualities]
    loader: tuple[str, ...]
    dense_bytes: int | None = None
    speed: ModelSpeed | None = None
    inputs: str = ""
    why_no_speed: str = ""

    @property
    def sparse_share(self) -> float | None:
        """The share of the model's parameters in layers that run sparse; None without a model in memory."""
        if not self.report.n_parameters:
            return None
        sparse = sum(row.shape[0] * row.shape[1] for row in self.report if row.format not in ("dense", "masked"))
        return sparse / self.report.n_parameters

    def facts(self) -> list[tuple[str, str]]:
        """Return share and speed in words, each with its name."""
        lines = []
        if (share := self.sparse_share) is not None and (covered := self.report.coverage) is not None:
            of = f"the model's {self.report.n_parameters:,} parameters"
            adds = covered.of_multiply_adds
            work = "" if adds is None else f" and {adds:.1%} of its multiply-adds"
            lines.append(("pruned", f"layers with {covered.of_parameters:.1%} of {of}{work}"))
            lines += [("dense", covered.dense)] if covered.dense else []
            lines.append(("sparse", f"layers with {share:.1%} of {of} run sparse"))
        if self.speed is not None:
            first, second = str(self.speed).splitlines()
            lines += [("speed", first), ("measured", f"on {self.inputs}; {second}")]
        elif self.why_no_speed:
            lines.append(("speed", f"not measured: {self.why_no_speed}"))
        return lines

    def text(self, out: Path) -> str:
        """Return the summary for people."""
        n_bytes = out.stat().st_size
        of_dense = f", {n_bytes / self.dense_bytes:.2f} of dense ({self.dense_bytes:,})" if self.dense_bytes else ""
        lines = [f"{word:<10}{text}" for word, text in (("size", f"{out}: {n_bytes:,} bytes{of_dense}"), *self.facts())]
        if self.quality:
            lines += ["", quality_table(**self.quality)]
        lines += ["", f"look at it:\n    sparsify inspect {out}\n    sparsify report {out} --html page.html"]
        return "\n".join([*lines, "", "load it:", *(f"    {line}".rstrip() for line in self.loader)])

    def as_json(self) -> dict[str, Any]:
        """Return the summary for programs."""
        found: dict[str, Any] = {"dense_bytes": self.dense_bytes, "sparse_share": self.sparse_share}
        if (covered := self.report.coverage) is not None:
            found |= {"pruned_share": covered.of_parameters, "pruned_work_share": covered.of_multiply_adds}
            found["dense"] = {part.type: part.n_parameters for part in covered.rest}
        if self.speed is not None:
            speed = {"dense_s": self.speed.dense.median_s, "sparse_s": self.speed.sparse.median_s}
            speed |= {"speedup": self.speed.speedup, "others_cores": self.speed.others_cores}
            found["speed"] = {**speed, "inputs": self.inputs, "machine": self.speed.machine}
        return {**found, "load": list(self.loader), **({"quality": self.quality} if self.quality else {})}


def inputs_to_time(arguments: argparse.Namespace, model: nn.Module) -> tuple[Inputs | None, str]:
    """Return inputs for the model, and their description; or None, and the reason.

    Given inputs that the model does not take are an error; guessed ones are not.
    """
    if given_inputs(arguments):
        inputs = inputs_of(arguments, model, arguments.model)
        return inputs, describe(inputs)
    try:
        inputs = make_inputs(model, arguments.model)
        start = time.perf_counter()
        check_inputs(model, arguments.model, inputs)
    except ValueError as error:
        return None, str(error)
    if (seconds := time.perf_counter() - start) > LONGEST_RUN_S:
        return None, f"one run takes {seconds:.0f} s; ask for it with --batch 1"
    return inputs, describe(inputs)


def dense_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's tensors, shared ones once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


def loading_lines(spec: str, model: nn.Module, out: Path) -> tuple[str, ...]:
    """Return lines of Python that build the model named `spec` anew and load the file onto it."""
    source, _, name = spec.partition(":")
    load = f"model = sparsify.load({str(out)!r}, dense.eval())"
    if source == "torchvision":
        build = ["import torchvision", "", f"dense = torchvision.models.get_model({name!r}, weights=None)"]
    elif source == "timm":
        build = ["import timm", "", f"dense = timm.create_model({name!r})"]
    elif source == "hf":
        kind = type(model).__name__
        config = f"transformers.AutoConfig.from_pretrained({name!r})"
        build = ["import transformers", "", f"dense = transformers.{kind}({config})"]
    else:
        build = [f"from {source} import {name}", "", f"dense = {name}()"]
    return ("import sparsify", *build, load)

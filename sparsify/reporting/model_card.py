"""Model card: the README.md of a folder, with the layers, sizes, speed and quality of a sparse model.

The part between two marks is ours and is written anew at each save; the rest of the file, and every key of its front
matter that is already there, belongs to the user.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from sparsify.conversion.module_surgery import layers_of_type
from sparsify.layers.records import disturbance_of, form_choice
from sparsify.outputs import new_file
from sparsify.reporting.report import report

BEGIN, END = "<!-- sparsify: begin -->", "<!-- sparsify: end -->"
_CARD = "README.md"
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class CardFacts:
    """Facts of a model that its layers do not tell.

    library: the library that loads it, a key of the Hub.
    snippet: lines of Python that load it.
    base_model: the dense model on the Hub.
    recipe: the way of pruning, as text or YAML.
    quality, speed: names and values, as measured by the user.
    """

    library: str
    snippet: str
    base_model: str | None = None
    recipe: str | None = None
    quality: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, Any] = field(default_factory=dict)


def write_card(
    folder: str | os.PathLike[str], model: nn.Module, facts: CardFacts, *, over: Collection[str] = ()
) -> None:
    """Write the card of a saved model, or our part of a card that is there.

    over: the keys of the front matter that are written even if they are there.
    """
    path = Path(folder) / _CARD
    front, body = _split(path.read_text(encoding="utf-8") if path.is_file() else "")
    if front is None:  # front matter of someone else's making: left as it is
        text = _with_part(body, _part(Path(folder), model, facts))
    else:
        for key, value in _front(facts).items():
            front[key] = value if key in over else front.get(key, value)
        tags = front.get("tags")
        if isinstance(tags, list) and "sparsify" not in tags:
            tags.append("sparsify")
        matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
        text = f"---\n{matter}---\n\n" + _with_part(body, _part(Path(folder), model, facts))
    with new_file(path, "cannot write ") as file:
        file.write(text.encode())


def _front(facts: CardFacts) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": facts.library, "tags": ["sparsify", "pruning", "sparse"]}
    if facts.base_model:
        front |= {"base_model": facts.base_model, "base_model_relation": "quantized"}
    return front


def _split(text: str) -> tuple[dict[str, Any] | None, str]:
    """Return the front matter of a card and the text after it; None for one that is no mapping."""
    if not text.startswith("---\n"):
        return {}, text
    matter, mark, body = text[4:].partition("\n---\n")
    try:
        front = yaml.safe_load(matter) if mark else None
    except yaml.YAMLError:
        front = None
    return (front, body.lstrip("\n")) if isinstance(front, dict) else (None, text)


def _with_part(body: str, part: str) -> str:
    before, mark, after = body.partition(BEGIN)
    if mark and END in after:
        return f"{before}{part}{after.partition(END)[2]}"
    return f"{body.rstrip()}\n\n{part}\n".lstrip("\n")


def _part(folder: Path, model: nn.Module, facts: CardFacts) -> str:
    lines = [BEGIN, "# Sparse model", "", *_summary(folder, model, facts), ""]
    lines += ["## Load it", "", "```python", facts.snippet, "```", ""]
    if facts.recipe:
        lines += ["## How it was pruned", "", "```yaml", facts.recipe.rstrip().replace("```", "'''"), "```", ""]
    lines += ["## Speed", "", *_speed(model, facts.speed), ""]
    if facts.quality:
        lines += ["## Quality", "", *_pairs("measure", facts.quality), ""]
    lines += ["## Layers", "", *_layers(model), "", END]
    return "\n".join(lines)


def _summary(folder: Path, model: nn.Module, facts: CardFacts) -> list[str]:
    found = report(model)
    total = found.layers
    sparse = [row for row in found if row.format != "dense"]
    n_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in _WEIGHTS)
    kind = "masked, to be trained on" if any(row.format == "masked" for row in found) else "exported, to be run"
    rows = {
        "state": kind,
        "sparsity of the layers below": f"{total.sparsity:.1%}",
        "these layers, of all parameters": f"{total.shape[1]:,} of {found.n_parameters:,}",
        "sparse layers": f"{len(sparse)} of {len(found)}",
        "weights of these layers in memory": f"{total.n_bytes / 1e6:.2f} MB, dense {total.dense_bytes / 1e6:.2f} MB",
        "files of weights": f"{n_bytes / 1e6:.2f} MB",
    }
    if facts.base_model:
        rows = {"base model": f"[{facts.base_model}](https://huggingface.co/{facts.base_model})", **rows}
    return _pairs("", rows)


def _speed(model: nn.Module, given: Mapping[str, Any]) -> list[str]:
    """Return the times of `export` for all its layers together, and the figures of the user."""
    modules = layers_of_type(model, nn.Module).values()
    choices = [choice for module in modules if (choice := form_choice(module))]
    measured = [choice for choice in choices if "dense" in choice.times_us and choice.form in choice.times_us]
    lines: list[str] = []
    if measured:
        dense_ms = sum(choice.times_us["dense"] for choice in measured) / 1e3
        ours_ms = sum(choice.times_us[choice.form] for choice in measured) / 1e3
        tokens = sorted({choice.tokens for choice in measured})
        lines.append(
            f"{len(measured)} layers, measured one by one at export: {ours_ms:.2f} ms, dense {dense_ms:.2f} ms, with "
            f"{', '.join(map(str, tokens[:3]))} rows of input, on {measured[0].machine}."
        )
        if n_busy := sum(bool(disturbance_of(module)) for module in modules):
            lines[0] += f" Uncertain for {n_busy} layers: other processes kept cores busy."
    if given:
        lines += ["", *_pairs("measure", given)] if lines else _pairs("measure", given)
    return lines or ["Not measured."]


def _pairs(title: str, values: Mapping[str, Any]) -> list[str]:
    return [f"| {title} | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in values.items())]


def _layers(model: nn.Module) -> list[str]:
    """Return a table of the layers; alike ones, with names that differ in numbers only, are one row."""
    groups: dict[tuple[str, tuple[int, int], str], list[float]] = {}
    for row in report(model):
        pattern = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
        groups.setdefault((pattern or "(root)", row.shape, row.format), []).append(row.sparsity)
    lines = ["| layers | number | shape | form | sparsity |", "|---|---|---|---|---|"]
    for (pattern, shape, form), sparsities in groups.items():
        low, high = min(sparsities), max(sparsities)
        shown = f"{low:.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:.1%} to {high:.1%}"
        lines.append(f"| `{_cell(pattern)}` | {len(sparsities)} | {shape[0]} x {shape[1]} | {form} | {shown} |")
    return lines


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")

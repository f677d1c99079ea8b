"""A page about a compressed model: one HTML file without requests to anywhere."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from sparsify.reporting.file_facts import FileFacts
from sparsify.reporting.png import data_url

_TEMPLATE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))

#: Columns of the layers, left out where no layer has such an error: of pruning on data, and of rounding.
_ERRORS = ("error", "int8 error")

#: Parts of the file with fewer bytes than this share are added up.
SMALL_PART = 0.005


@dataclass(frozen=True)
class RunFacts:
    """The facts about the run that wrote a file; all of them may be missing.

    summary: lines of "word: text". quality: before ("dense") and after ("sparse"). recipe: its text.
    loader: lines of Python. dense_bytes: of the model before.
    """

    summary: Sequence[tuple[str, str]] = ()
    quality: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    recipe: str = ""
    loader: Sequence[str] = ()
    dense_bytes: int | None = None


def page(facts: FileFacts, run: RunFacts | None = None) -> str:
    """Return the HTML page about a file, and the run that wrote it if it is known."""
    run = run or RunFacts()
    loader = run.loader or (
        "import sparsify",
        "",
        "dense = ...  # the model as it was before, with any weights",
        f"model = sparsify.load({facts.path!r}, dense)",
    )
    return _TEMPLATE.substitute(
        title=html.escape(f"sparsify: {os.path.basename(facts.path)}"),
        summary=_summary(facts, run),
        quality=_quality(run),
        bytes=_bytes(facts),
        layers=_layers(facts),
        times=_times(facts),
        masks=_masks(facts),
        recipe=f"<h2>Recipe</h2>{_code(run.recipe)}" if run.recipe else "",
        loader=_code("\n".join(loader)),
    )


def _summary(facts: FileFacts, run: RunFacts) -> str:
    total = facts.rows.layers
    size = f"{facts.n_bytes:,} bytes"
    if run.dense_bytes:
        size += f", {facts.n_bytes / run.dense_bytes:.2f} of dense ({run.dense_bytes:,} bytes)"
    lines = [
        ("File", size),
        ("Layers", f"{len(facts.rows)} with {total.shape[1]:,} weights, {total.sparsity:.1%} of them removed"),
        ("Their bytes", f"{total.n_bytes:,}, {total.n_bytes / max(total.dense_bytes, 1):.2f} of dense"),
        *([("Measured on", facts.machine)] if facts.machine else []),
        *run.summary,
    ]
    return "".join(f"<div><dt>{html.escape(word)}</dt><dd>{html.escape(text)}</dd></div>" for word, text in lines)


def _quality(run: RunFacts) -> str:
    dense, sparse = run.quality.get("dense", {}), run.quality.get("sparse", {})
    lines = [(key, f"{dense[key]:.4g}", f"{value:.4g}") for key, value in sparse.items() if key in dense]
    return f"<h2>Quality</h2>{_table('Quality before and after', ('', 'dense', 'sparse'), lines)}" if lines else ""


def _bytes(facts: FileFacts) -> str:
    small = {name for name, n in facts.bytes_by_part.items() if n < SMALL_PART * facts.n_bytes}
    parts = {name: n for name, n in facts.bytes_by_part.items() if name not in small}
    if small:
        parts[f"{len(small)} smaller parts"] = sum(facts.bytes_by_part[name] for name in small)
    lines = [(name, f"{n:,}", f"{n / facts.n_bytes:.1%}", _bar(n / facts.n_bytes)) for name, n in parts.items()]
    return _table("Bytes of the file by part", ("part", "bytes", "of the file", ""), lines)


def _layers(facts: FileFacts) -> str:
    most = max((row.n_bytes for row in facts.rows), default=1)
    lines = []
    for row in sorted(facts.rows, key=lambda row: -row.n_bytes):
        shape = f"{row.shape[0]} x {row.shape[1]}"
        errors = ["" if error is None else f"{error:.4f}" for error in (row.error, row.int8_error)]
        share = f"{row.n_bytes / max(row.dense_bytes, 1):.3f}"
        form = facts.forms.get(row.name, "")
        cells = (row.name or "(root)", shape, f"{row.sparsity:.1%}", row.format, form, f"{row.n_bytes:,}", share)
        lines.append((*cells, _bar(row.n_bytes / max(most, 1)), *errors, row.reason))
    head = ("layer", "shape", "sparsity", "in the file", "in memory", "bytes", "of dense", "size", *_ERRORS, "why")
    hidden = [name for name in _ERRORS if all(not line[head.index(name)] for line in lines)]
    return _table("Layers by size", head, lines, hidden=hidden)


def _times(facts: FileFacts) -> str:
    timed = [row for row in facts.rows if "dense" in row.times_us]
    if not timed:
        return "<p>No times: the forms of this file were asked for, and not measured.</p>"
    chosen = {row.name: row.times_us.get(facts.forms.get(row.name, "dense"), row.times_us["dense"]) for row in timed}
    most = max(row.times_us["dense"] for row in timed)
    lines = []
    for row in sorted(timed, key=lambda row: -chosen[row.name]):
        dense, ours = row.times_us["dense"], chosen[row.name]
        bars = _Markup(_bar(dense / most, "before") + _bar(ours / most))
        cells = (row.name or "(root)", facts.forms.get(row.name, ""), f"{dense:,.0f}", f"{ours:,.0f}")
        lines.append((*cells, f"{dense / max(ours, 1e-9):.2f}x", bars))
    head = ("layer", "form", "dense, us", "here, us", "times", "dense above, chosen form below")
    return _table("Layers by time, of one call on the rows of input they were measured for", head, lines)


def _masks(facts: FileFacts) -> str:
    figures = []
    for row in facts.rows:
        if (grid := facts.masks.get(row.name)) is not None:
            name = html.escape(row.name or "(root)")
            what = f"Kept weights of {name}, {row.shape[0]} x {row.shape[1]}: {1 - row.sparsity:.1%} of all"
            highest = max(float(grid.max()), 1e-9)
            url = data_url(grid / highest)
            size = f'width="{2 * grid.shape[1]}" height="{2 * grid.shape[0]}"'
            figures.append(f'<figure><img alt="{what}" src="{url}" {size}><figcaption>{name}</figcaption></figure>')
    left = len(facts.rows) - len(figures)
    more = f"<p>{left} further layers are not drawn.</p>" if left else ""
    return f'<div class="masks">{"".join(figures)}</div>{more}'


class _Markup(str):
    """Text that is HTML already."""


def _bar(share: float, kind: str = "now") -> _Markup:
    return _Markup(f'<span class="bar {kind}" style="width:{max(share, 0.002) * 8:.3f}rem"></span>')


def _table(caption: str, head: Sequence[str], lines: Iterable[Sequence[str]], hidden: Sequence[str] = ()) -> str:
    """Return a table with a caption; of each line the first cell names the row. Columns of bars hold no text."""
    shown = [i for i, name in enumerate(head) if name not in hidden]
    heads = "".join(f'<th scope="col">{html.escape(head[i])}</th>' if head[i] else "<td></td>" for i in shown)
    body = []
    for line in lines:
        cells = [cell if isinstance(cell, _Markup) else html.escape(cell) for cell in line]
        rest = "".join(f"<td>{cells[i]}</td>" for i in shown[1:])
        body.append(f'<tr><th scope="row">{cells[0]}</th>{rest}</tr>')
    label = html.escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _code(text: str) -> str:
    return f'<pre tabindex="0"><code>{html.escape(text)}</code></pre>'

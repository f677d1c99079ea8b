"""Sensitivity: the damage to the model's output for each layer and sparsity; its picture, and an allocation from it."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsify.calibration.batches import Batch, input_rows, naming_batch, read_batches
from sparsify.calibration.block_call import output_tensor
from sparsify.calibration.eval_mode import eval_without_cache
from sparsify.calibration.padding import Padding, see_padding
from sparsify.calibration.sequential import calibrate_groups
from sparsify.conversion.convert import sparse_layers
from sparsify.conversion.transaction import Transaction
from sparsify.layers import MaskedLayer
from sparsify.masking.allocation import capped, check_sparsity, least_error, n_removed
from sparsify.masking.layer_solve import prune_layer
from sparsify.masking.methods.registry import Method
from sparsify.masking.patterns import Pattern, parse_pattern
from sparsify.masking.spec import LayerSpec
from sparsify.outputs import new_file
from sparsify.tables import Listed, Listing, Table

SPARSITIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Sensitivity(Listed):
    """The damage of each layer, pruned alone, at each of `sparsities`; layers in the model's order.

    Damage is the squared change of the model's output over all data, relative to the output's variance. A sparsity is a
    fraction of the layer's `n_units`. `str()` is a table for people.
    """

    sparsities: tuple[float, ...]
    damage: Mapping[str, tuple[float, ...]]
    n_units: Mapping[str, int]

    def allocate(self, sparsity: float, *, max_sparsity: float | None = None) -> dict[str, float]:
        """Return a sparsity for each layer, with the least sum of damages at this sparsity of all layers together.

        Damage counts as a straight line between measured sparsities, and as never less steep later: then the cheapest
        piece first is exact. No layer gets more than max_sparsity, by default the highest measured sparsity. Raises
        ValueError if max_sparsity leaves no room.

        >>> measured = Sensitivity((0.5, 0.9), {"a": (0.1, 1.0), "b": (0.0, 0.1)}, {"a": 100, "b": 100})
        >>> measured.allocate(0.6)
        {'a': 0.5, 'b': 0.7}
        """
        highest = self.sparsities[-1] if max_sparsity is None else check_sparsity(max_sparsity, "max_sparsity")
        curves = {name: self._curve(name) for name in self.damage}

        def allocate(n_units: Mapping[str, int], target: float) -> dict[str, int]:
            return least_error({name: curves[name] for name in n_units}, n_removed(target, sum(n_units.values())))

        removed = capped(allocate, self.n_units, check_sparsity(sparsity), highest)
        return {name: n / max(self.n_units[name], 1) for name, n in removed.items()}

    def listing(self, targets: Mapping[str, float] | None = None) -> Listing:
        """Return the layers with most and least damage, and a table of all, with a target for each layer if given."""
        head = ("layer", *(f"{s:g}" for s in self.sparsities), *(["target"] if targets else []))
        rows = []
        for name, damage in self.damage.items():
            target = [f"{targets[name]:.4f}"] if targets else []
            rows.append((name or "(root)", *(f"{d:.4f}" for d in damage), *target))
        summary = ["squared change of the model's output, relative to its variance, with one layer alone pruned"]
        if self.damage:
            at_most = {name: damage[-1] for name, damage in self.damage.items()}
            ends = ((kind(at_most, key=at_most.__getitem__), word) for kind, word in ((max, "most"), (min, "least")))
            said = ", ".join(f"{word} by {name or '(root)'} ({at_most[name]:.4f})" for name, word in ends)
            summary.append(f"at sparsity {self.sparsities[-1]:g}: {said}")
        return Listing(summary, [("", Table(head, rows, spare=head[2 : len(self.sparsities)]))])

    def _curve(self, name: str) -> list[tuple[int, float]]:
        """Return points (removed units, damage) up to all units, the last slope continued."""
        n = self.n_units[name]
        points = [(0, 0.0), *((n_removed(s, n), d) for s, d in zip(self.sparsities, self.damage[name], strict=True))]
        (n_before, before), (n_last, last) = points[-2:]
        if n_last < n:
            points.append((n, last + (last - before) / max(n_last - n_before, 1) * (n - n_last)))
        return points


def measure_sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    method: str | Method = "magnitude",
    pattern: str = "unstructured",
    refit: bool = False,
    progress: bool = False,
) -> Sensitivity:
    """Prune each layer of a converted model alone, at each sparsity, and measure the change of the model's output.

    data: batches as for `prune`; the model runs on all of them for each layer and sparsity, so a few are enough
    sparsities: rising, between 0 and 1
    method, pattern, refit: as for `prune`
    progress: show a bar

    All layers are unchanged afterwards. The output is the first tensor returned by the model; padding does not count.
    Raises ValueError for other sparsities, and for data refused by `prune`.

    >>> model = sparsify.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    >>> list(measure_sensitivity(model, [torch.randn(16, 8)], sparsities=(0.25, 0.5)).damage)
    ['0', '2']
    """
    parsed = parse_pattern(pattern)
    check_sparsities(sparsities, parsed)
    layers = sparse_layers(model)
    n_units = {name: parsed.n_units(layer.shape) for name, layer in layers.items()}
    batches = read_batches(model, data)
    damage: dict[str, tuple[float, ...]] = {}
    with Transaction(model), eval_without_cache(model), torch.inference_mode(False), torch.no_grad():
        padding = see_padding(model, batches, [("output", "")])
        dense = []
        for number, batch in enumerate(batches):
            with naming_batch(number):
                dense.append(_output(model, batch, padding))
            if not torch.isfinite(dense[-1]).all():
                raise ValueError(f"the model's output on batch {number} of the calibration data holds NaN or Inf")
        total = len(layers) * len(sparsities)
        with tqdm(total=total, desc="sensitivity", unit="run", disable=not progress or None) as bar:
            for group in calibrate_groups(model, list(layers), batches):
                gram = group.gram.matrix
                for name in group.names:
                    damages = []
                    for sparsity in sparsities:
                        spec = LayerSpec(method, parsed, n_removed(sparsity, n_units[name]), refit)
                        with _pruned(name, layers[name], spec, gram):
                            outputs = [_output(model, batch, padding) for batch in batches]
                        damages.append(_damage(name, dense, outputs))
                        bar.set_postfix_str(f"{name}, {sparsity:g}: {damages[-1]:.4f}")
                        bar.update(1)
                    damage[name] = tuple(damages)
    return Sensitivity(tuple(sparsities), {name: damage[name] for name in layers}, n_units)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if such a picture cannot be drawn: matplotlib is missing, or does not know the suffix."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install matplotlib") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(f"picture {path}: its name must end in one of: .{', .'.join(sorted(kinds))}")


def plot_sensitivity(
    measured: Sensitivity,
    path: str | os.PathLike[str],
    *,
    targets: Mapping[str, float] | None = None,
    title: str = "",
) -> None:
    """Draw the damage of every layer at every sparsity into a picture, .png or .svg. Needs matplotlib.

    targets: a sparsity for each layer, marked by a dot. A layer's name is followed by its share of all units. The
    colours span four powers of ten below the largest damage: a layer without any damage takes no colours from others.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    names, columns = list(measured.damage), len(measured.sparsities)
    total = max(sum(measured.n_units.values()), 1)
    labels = [f"{name or '(root)'}  {measured.n_units[name] / total:.1%}" for name in names]
    width = 4 + 0.8 * columns + 0.07 * max(map(len, labels), default=0)  # inches
    figure = Figure(figsize=(width, max(4, 2 + 0.2 * len(names))), layout="constrained")
    axes = figure.subplots()
    damage = torch.tensor(list(measured.damage.values()), dtype=torch.float64)
    highest = max(math.ceil(math.log10(max(float(damage.max()), 1e-12))), -11)
    values = damage.clamp_min(10.0 ** (highest - 4)).log10()
    image = axes.imshow(values.numpy(), aspect="auto", cmap="magma", vmin=highest - 4, vmax=highest)
    axes.set_xticks(range(columns), [f"{s:g}" for s in measured.sparsities])
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.set_xlabel("sparsity of this layer alone")
    axes.set_title(f"Damage of {len(names)} layers, each pruned alone" + (f"\n{title}" if title else ""), fontsize=10)
    if targets:
        places = [_place(targets[name], measured.sparsities) for name in names]
        axes.plot(places, range(len(names)), "o", color="cyan", markeredgecolor="black", markersize=5, label="target")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8, frameon=False)
    figure.colorbar(image, label="log10 of the relative squared change of the output", shrink=min(1, 12 / len(names)))
    with new_file(path) as file:
        figure.savefig(file, format=Path(path).suffix.lower().removeprefix("."))


def _place(sparsity: float, columns: Sequence[float]) -> float:
    """Return the place of a sparsity between columns, from -0.5 at no sparsity on.

    >>> [round(_place(s, (0.4, 0.5, 0.9)), 6) for s in (0.0, 0.4, 0.7, 1.0)]
    [-0.5, 0.0, 1.5, 2.5]
    """
    points = [(0.0, -0.5), *((s, float(i)) for i, s in enumerate(columns)), (1.0, len(columns) - 0.5)]
    for (low, start), (high, end) in itertools.pairwise(points):
        if sparsity <= high:
            return start + (end - start) * (sparsity - low) / (high - low)
    return points[-1][1]


@contextlib.contextmanager
def _pruned(name: str, layer: MaskedLayer, spec: LayerSpec, gram: Tensor) -> Iterator[None]:
    """Prune one layer inside the block only."""
    with Transaction(layer) as undo:
        undo.keep([layer.weight])
        new, _ = prune_layer(name, layer.weight_matrix.detach(), layer.matrix(layer.mask), spec, gram)
        layer.weight.detach().copy_(layer.as_weight(new))
        yield
        undo.roll_back()


def _damage(name: str, dense: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Return the squared change of the outputs, relative to their variance."""
    change = sum(float((output - before).square().sum()) for output, before in zip(outputs, dense, strict=True))
    rows = torch.cat(list(dense))
    damage = change / float((rows - rows.mean(0)).square().sum().clamp_min(1e-30))
    if not math.isfinite(damage):
        raise ValueError(f"{name or '(root)'}: pruned alone, it makes the model's output NaN or Inf")
    return damage


def _output(model: nn.Module, batch: Batch, padding: Padding) -> Tensor:
    """Return the rows of the model's output without padding."""
    output = output_tensor(model(*batch.args, **batch.kwargs))
    return input_rows(output, padding.counts(("output", ""), 0, output.shape[:-1], batch)).float()


def check_sparsities(sparsities: Sequence[float], pattern: Pattern) -> None:
    """Raise ValueError for sparsities that do not rise between 0 and 1, or a pattern that fixes them."""
    if pattern.is_nm:
        raise ValueError(f"pattern {pattern.text} fixes every layer's sparsity: there is nothing to allocate")
    if not sparsities or any(not 0 < s < 1 for s in sparsities) or list(sparsities) != sorted(set(sparsities)):
        raise ValueError(f"sparsities must rise between 0 and 1, got {list(sparsities)}")

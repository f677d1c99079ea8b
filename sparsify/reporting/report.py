"""Report of a model's layers: sparsity, form, bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsify.conversion.converters.table import converter_for, default_converters, matrices
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.inference.coverage import Coverage, coverage
from sparsify.inference.form_selection import why_chosen
from sparsify.kernels import quantizes_inputs
from sparsify.layer_names import join
from sparsify.layers import Int8Embedding, MaskedLayer, PackedLayer
from sparsify.layers.copies import warn_stale
from sparsify.layers.records import FormChoice, disturbance_of, form_choice, pruning_result, rounding_of
from sparsify.tables import Listed, Listing, Table

#: Of the printed table; a column without any entry is left out.
_COLUMNS = (
    "layer",
    "shape",
    "sparsity",
    "format",
    "numbers",
    "bytes",
    "of dense",
    "error",
    "int8 error",
    "time",
    "why",
)

#: The columns that a narrow terminal does without, the first of them first.
_SPARE = ("of dense", "shape", "time", "numbers", "int8 error", "error")


@dataclass(frozen=True)
class Row:
    """One layer.

    format: "dense", "masked" for a layer in training, the form of an exported layer, or the format in a file.
    n_bytes, dense_bytes: those of the weight alone, as it is and dense in the same dtype.
    reason, times_us: the reason of export for the form, and the times measured for each.
    numbers: those that the layer computes with: "int8", "int8 weights" (with inputs as they are), or the name of a
    dtype; in a file, "int8 weights" or the dtype of the weights.
    int8_error: the relative change of the outputs by rounding, on the example of `export` or on random rows; of a
    layer left as it is, the change that was too much.
    error, time_s: of pruning on calibration data, the relative change of the outputs there, and the seconds for mask
    and weights.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    format: str
    n_bytes: int
    dense_bytes: int
    reason: str = ""
    times_us: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    time_s: float | None = None
    numbers: str = ""
    int8_error: float | None = None


@dataclass(frozen=True)
class Report(Listed, Sequence[Row]):
    """The rows of all layers; `str()` of it is a table for people, with the total and the share of the model in front.

    rest: all parameters outside of the rows, dense; its shape counts them, (1, n). None if there are none.
    coverage: the share of the model in masked and exported layers; None without a model.
    """

    rows: tuple[Row, ...]
    rest: Row | None = None
    coverage: Coverage | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.rows[index]

    @property
    def n_parameters(self) -> int:
        """The parameters of the whole model, as before packing; 0 without a model."""
        return 0 if self.coverage is None else self.coverage.n_parameters

    @property
    def total(self) -> Row:
        """The whole model, or all layers without a model; its shape counts the weights, (1, n)."""
        layers, rest = self.layers, self.rest
        if rest is None:
            return layers
        n = layers.shape[1] + rest.shape[1]
        n_bytes, dense_bytes = layers.n_bytes + rest.n_bytes, layers.dense_bytes + rest.dense_bytes
        sparsity = layers.sparsity * layers.shape[1] / n
        return replace(layers, shape=(1, n), sparsity=sparsity, n_bytes=n_bytes, dense_bytes=dense_bytes)

    @property
    def layers(self) -> Row:
        """All layers together; its shape counts the weights, (1, n)."""
        n_weights = [row.shape[0] * row.shape[1] for row in self.rows]
        zeros = sum(row.sparsity * n for row, n in zip(self.rows, n_weights, strict=True))
        return Row(
            name="total",
            shape=(1, sum(n_weights)),
            sparsity=zeros / max(sum(n_weights), 1),
            format="",
            n_bytes=sum(row.n_bytes for row in self.rows),
            dense_bytes=sum(row.dense_bytes for row in self.rows),
            time_s=sum(times) if (times := [row.time_s for row in self.rows if row.time_s is not None]) else None,
        )

    def listing(self) -> Listing:
        """Return all layers in a sentence or two, and a table of them; columns without any entry are left out."""
        columns: dict[str, list[str]] = {name: [] for name in _COLUMNS}
        for row in self.rows:
            columns["layer"].append(row.name or "(root)")
            columns["shape"].append(f"{row.shape[0]}x{row.shape[1]}")
            columns["sparsity"].append(f"{row.sparsity:.4f}")
            columns["format"].append(row.format)
            columns["bytes"].append(f"{row.n_bytes:,}")
            columns["of dense"].append(f"{row.n_bytes / row.dense_bytes:.3f}" if row.dense_bytes else "-")
            columns["numbers"].append(row.numbers if any("int8" in row.numbers for row in self.rows) else "")
            columns["error"].append("" if row.error is None else f"{row.error:.4f}")
            columns["int8 error"].append("" if row.int8_error is None else f"{row.int8_error:.4f}")
            columns["time"].append("" if row.time_s is None else f"{row.time_s:.2f} s")
            columns["why"].append(row.reason)
        filled = {name: cells for name, cells in columns.items() if any(cells) or not self.rows}
        table = Table(tuple(filled), list(zip(*filled.values(), strict=True)), left=("why",), spare=_SPARE)
        return Listing(self._summary(), [("", table)])

    def _summary(self) -> list[str]:
        """Return the total, the sum of the layers, and the share of the model in pruned layers."""
        layers, total = self.layers, self.total
        took = "" if layers.time_s is None else f", pruned in {layers.time_s:.2f} s"
        of_layers = f"{len(self.rows)} layers, {layers.shape[1]:,} weights, {_size(layers)}{took}"
        if self.coverage is None or not self.n_parameters:
            return [f"total: {of_layers}"]
        return [f"total: {total.shape[1]:,} parameters, {_size(total)}", f"of these: {of_layers}", str(self.coverage)]


def report(model: nn.Module, example: Any = None) -> Report:
    """List every exported or masked layer, and every dense one of a type in convert's default, with its memory.

    The total is of the whole model. Beside it stands the share of the model in masked and exported layers, and what
    else there is, by type.

    example: a typical input (a tensor, a tuple, or a dict by name), on which the model runs once: then the share of the
    multiply-adds is told too. Raises ValueError if the model does not run on it.

    >>> model = sparsify.convert(nn.Sequential(nn.Linear(8, 4)))
    >>> row = report(sparsify.export(sparsify.prune(model, 0.75), format="csr"))[0]
    >>> row.format, row.n_bytes, row.dense_bytes
    ('csr', 60, 128)
    """
    warn_stale(layers_of_type(model, MaskedLayer))
    rows: list[Row] = []
    pruned: list[nn.Module] = []
    default = default_converters(model)
    for name, layer in layers_of_type(model, nn.Module).items():
        choice = form_choice(layer)
        if isinstance(layer, (MaskedLayer, PackedLayer)) or choice is not None:
            pruned.append(layer)
        measured = (_why(choice, layer), dict(choice.times_us)) if choice is not None else ("", {})
        if isinstance(layer, PackedLayer):
            if (applied := layer.followed_by if layer.activation == "none" else layer.activation) != "none":
                applies = f"applies {applied}"
                measured = (f"{measured[0]}; {applies}" if measured[0] else applies, measured[1])
            dense_bytes = layer.shape[0] * layer.shape[1] * layer.float_dtype.itemsize
            n_bytes = _n_bytes(*layer.tensors)
            rows.append(Row(name, layer.shape, layer.sparsity, layer.form, n_bytes, dense_bytes, *measured))
        if isinstance(layer, Int8Embedding):
            shape, n_bytes = (layer.num_embeddings, layer.embedding_dim), _n_bytes(layer.values, layer.weight_scale)
            rows.append(Row(name, shape, 0.0, "dense", n_bytes, layer.values.numel() * layer.own_dtype.itemsize))
        kind = converter_for(layer)
        by_default = kind is None or kind in default or isinstance(layer, MaskedLayer) or choice is not None
        for part, weight in matrices(layer).items() if by_default else ():
            shape, n_bytes = (weight.shape[0], weight.shape[1]), _n_bytes(weight)
            if isinstance(layer, MaskedLayer):
                row = Row(name, shape, layer.sparsity, "masked", n_bytes + _n_bytes(layer.mask), n_bytes)
            else:
                row = Row(join(name, part), shape, _zeros(weight.detach()), "dense", n_bytes, n_bytes, *measured)
            rows.append(row)
        if (result := pruning_result(layer)) is not None:
            rows[-1] = replace(rows[-1], error=result.error, time_s=result.time_s)
        if isinstance(layer, (PackedLayer, Int8Embedding)) or rounding_of(layer) is not None:
            rows[-1] = _with_rounding(rows[-1], layer)
    found = coverage(model, pruned, example)
    return Report(tuple(rows), _rest(model, rows, found.n_parameters), found)


def _why(choice: FormChoice, layer: nn.Module) -> str:
    weight = layer._parameters.get("weight")
    why = choice.reason if weight is None else why_chosen(choice, weight)
    busy = disturbance_of(layer)
    return f"{why}; uncertain, {busy:g} cores were busy" if busy else why


def _with_rounding(row: Row, layer: nn.Module) -> Row:
    """Return the row of an exported layer with the numbers that it computes with, and its rounding."""
    quantized = isinstance(layer, (PackedLayer, Int8Embedding)) and layer.own_dtype is not None
    inputs = quantized and isinstance(layer, PackedLayer) and quantizes_inputs(layer.form)
    dtype = layer.float_dtype if isinstance(layer, PackedLayer) else layer.weight.dtype
    numbers = "int8" if inputs else "int8 weights" if quantized else str(dtype).removeprefix("torch.")
    rounding = rounding_of(layer)
    if rounding is None:
        return replace(row, numbers=numbers)
    why = "; ".join(filter(None, (row.reason, rounding.reason)))
    error = rounding.by_inputs if inputs else rounding.by_weights
    shown = error if quantized or not rounding.allowed else None
    return replace(row, numbers=numbers, int8_error=shown, reason=why)


def _rest(model: nn.Module, rows: Sequence[Row], n_parameters: int) -> Row | None:
    """Return the parameters outside of all rows as a row; None without any."""
    n = n_parameters - sum(row.shape[0] * row.shape[1] for row in rows)
    packed = {name for name, layer in model.named_modules() if isinstance(layer, (PackedLayer, Int8Embedding))}
    n_bytes = sum(p.nbytes for p in model.parameters() if not is_lazy(p))
    n_bytes -= sum(row.dense_bytes for row in rows if row.name not in packed)
    return Row("the rest", (1, n), 0.0, "", n_bytes, n_bytes) if n > 0 else None


def _size(row: Row) -> str:
    """Return sparsity and bytes of a row in words."""
    return f"sparsity {row.sparsity:.4f}, {row.n_bytes:,} bytes, {row.n_bytes / max(row.dense_bytes, 1):.3f} of dense"


def _zeros(weight: Tensor) -> float:
    """Return the fraction of zeros in a dense weight."""
    return 1 - int(weight.count_nonzero()) / weight.numel() if weight.numel() and not weight.is_meta else 0.0


def _n_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

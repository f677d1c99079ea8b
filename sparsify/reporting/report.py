"""Report of a model's layers: sparsity, form, bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from sparsify.conversion.converters.table import converter_for, matrices
from sparsify.conversion.module_surgery import layers_of_type
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
    """The rows of all layers; `str()` of it is a table for people.

    n_parameters: of the whole model, dense; 0 without a model. `str()` tells if the rows hold less than half.
    """

    rows: tuple[Row, ...]
    n_parameters: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.rows[index]

    @property
    def total(self) -> Row:
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
        """Return the total in a sentence, and another if the layers hold less than half of the model."""
        total = self.total
        n_weights, share = total.shape[1], total.n_bytes / max(total.dense_bytes, 1)
        of_all = f"total: {len(self.rows)} layers, {n_weights:,} weights, sparsity {total.sparsity:.4f}"
        took = "" if total.time_s is None else f", pruned in {total.time_s:.2f} s"
        sentences = [f"{of_all}, {total.n_bytes:,} bytes, {share:.3f} of dense{took}"]
        if 2 * n_weights < self.n_parameters:
            part = f"{n_weights / self.n_parameters:.1%} of the model's {self.n_parameters:,} parameters"
            sentences.append(f"These layers hold {part}; the rest is dense.")
        return sentences


def report(model: nn.Module) -> Report:
    """List every exported or masked layer, and every dense one of a type in convert's default, with its memory.

    >>> model = sparsify.convert(nn.Sequential(nn.Linear(8, 4)))
    >>> row = report(sparsify.export(sparsify.prune(model, 0.75), format="csr"))[0]
    >>> row.format, row.n_bytes, row.dense_bytes
    ('csr', 60, 128)
    """
    warn_stale(layers_of_type(model, MaskedLayer))
    rows = []
    for name, layer in layers_of_type(model, nn.Module).items():
        choice = form_choice(layer)
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
        by_default = kind is None or kind.by_default or isinstance(layer, MaskedLayer) or choice is not None
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
    return Report(tuple(rows), _n_parameters(model))


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


def _n_parameters(model: nn.Module) -> int:
    """Count the parameters of a model, as before its layers were packed."""
    n_packed = sum(layer.shape[0] * layer.shape[1] for layer in layers_of_type(model, PackedLayer).values())
    n_packed += sum(layer.values.numel() for layer in layers_of_type(model, Int8Embedding).values())
    return n_packed + sum(p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter))


def _zeros(weight: Tensor) -> float:
    """Return the fraction of zeros in a dense weight."""
    return 1 - int(weight.count_nonzero()) / weight.numel() if weight.numel() and not weight.is_meta else 0.0


def _n_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

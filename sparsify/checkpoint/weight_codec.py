"""One layer's weight in a file: its format, and its tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.checkpoint.container import LayerEntry
from sparsify.checkpoint.tensor_file import DTYPES
from sparsify.conversion.converters.table import matrices
from sparsify.conversion.foreign_masks import pruned_by_torch
from sparsify.errors import CheckpointError
from sparsify.kernels.csr import (
    CSR,
    Bitmask,
    bitmask_bytes,
    bitmask_to_csr,
    check_bitmask,
    check_csr,
    csr_bytes,
    csr_to_dense,
    dense_to_csr,
    pack_bitmask,
)
from sparsify.kernels.int8 import check_quantized, dequantize
from sparsify.layer_names import join
from sparsify.layers import Int8Embedding, MaskedLayer, PackedLayer
from sparsify.layers.fsdp import whole

#: The tensors that hold the weight of layer NAME: NAME.weight.PART, or NAME.weight itself for "dense".
_PARTS: dict[str, tuple[str, ...]] = {"csr": CSR._fields, "bitmask": Bitmask._fields, "dense": ()}

#: And behind them, of int8 values.
_SCALE = "scale"

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class StoredWeight(NamedTuple):
    """A weight from a file, checked: its parts as they are."""

    entry: LayerEntry
    parts: list[Tensor]

    @property
    def values(self) -> Tensor:
        """The values, int8 if there is a scale."""
        return self.parts[len(_PARTS[self.entry.format] or ("",)) - 1]

    @property
    def scale(self) -> Tensor | None:
        """The scales of int8 values."""
        return self.parts[-1] if self.entry.dequantized else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight, and of its layer."""
        return _DTYPES.get(self.entry.dequantized, self.values.dtype)

    @property
    def csr(self) -> CSR:
        """The weight as CSR, with int8 values as they are."""
        if self.entry.format == "bitmask":
            return bitmask_to_csr(Bitmask(*self.parts[:2]), self.entry.shape)
        if self.entry.format == "csr":
            return CSR(*self.parts[:3])
        return dense_to_csr(self.values, not_zero(self.values))

    @property
    def plain(self) -> CSR:
        """The weight as CSR in its own dtype."""
        return self.csr if self.scale is None else dequantize(self.csr, self.scale, self.dtype)


def encode_weight(module: nn.Module) -> tuple[LayerEntry, dict[str, Tensor]]:
    """Choose the smallest format for a layer's weight, and pack it."""
    dequantized, scale = {}, {}
    if isinstance(module, Int8Embedding):
        dtype, (rows, dim) = DTYPES[module.own_dtype], module.values.shape
        about = {"module": "Embedding", "format": "dense", "out_features": rows, "in_features": dim}
        entry = LayerEntry.model_validate({**about, "dequantized": dtype})
        return entry, {"": module.values, _SCALE: module.weight_scale}
    if isinstance(module, PackedLayer):
        becomes = "CSRLinear"
        weight, mask = csr_to_dense(module.stored_csr, module.shape)
        if module.own_dtype is not None:
            dequantized, scale = {"dequantized": DTYPES[module.own_dtype]}, {_SCALE: module.tensors[-1]}
    elif isinstance(module, MaskedLayer):
        becomes = "SparseLinear"
        own = dict(pruned_by_torch(module)).get("weight", module.weight)
        weight, mask = module.matrix(whole(own.detach())), module.matrix(module.mask)
    else:
        becomes = "Linear"
        weight = matrices(module)[""].detach()
        mask = not_zero(weight)
    shape, n_kept, itemsize = (weight.shape[0], weight.shape[1]), int(mask.sum()), weight.element_size()
    sizes = {"bitmask": bitmask_bytes(shape, n_kept, itemsize), "csr": csr_bytes(shape, n_kept, itemsize)}
    if torch.equal(mask, not_zero(weight)):  # only then do dense weights say which are kept
        sizes["dense"] = weight.numel() * itemsize
    chosen = min(sizes, key=lambda name: sizes[name])
    entry = LayerEntry.model_validate(
        {
            "module": becomes,
            "format": chosen,
            "out_features": shape[0],
            "in_features": shape[1],
            **dequantized,
        }
    )
    if chosen == "dense":
        return entry, {"": weight, **scale}
    return entry, (dense_to_csr if chosen == "csr" else pack_bitmask)(weight, mask)._asdict() | scale


def packed_bytes(shape: tuple[int, int], n_kept: int, itemsize: int) -> int:
    """Return the bytes of a weight in its smallest format."""
    n_dense = shape[0] * shape[1] * itemsize
    return min(csr_bytes(shape, n_kept, itemsize), bitmask_bytes(shape, n_kept, itemsize), n_dense)


def decode_weight(entry: LayerEntry, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the weight and the mask, both (out_features, in_features), of a packed weight from a file."""
    other_tensors({"": entry}, tensors)
    stored = decode_weights({"": entry}, dict(tensors))[""]
    return csr_to_dense(stored.plain, entry.shape)


def decode_weights(layers: Mapping[str, LayerEntry], tensors: dict[str, Tensor]) -> dict[str, StoredWeight]:
    """Take the parts of every packed weight out of `tensors`, and check them."""
    weights = {}
    for name, entry in layers.items():
        parts = [tensors.pop(key) for key in part_names(name, entry)]
        with _naming(name):
            _check_parts(entry, parts)
        weights[name] = StoredWeight(entry, parts)
    return weights


def check_weight(name: str, entry: LayerEntry, tensors: Mapping[str, Tensor]) -> tuple[int, torch.dtype]:
    """Check a packed weight as `decode_weights` does, without unpacking anything.

    Returns the number of kept weights, and the dtype of the weight.
    """
    parts = [tensors[key] for key in part_names(name, entry)]
    with _naming(name):
        _check_parts(entry, parts)
    stored = StoredWeight(entry, parts)
    values = stored.values
    counted = entry.format != "dense" or entry.module == "Embedding"
    return values.numel() if counted else int(not_zero(values).sum()), stored.dtype


def other_tensors(layers: Mapping[str, LayerEntry], tensors: Mapping[str, object]) -> set[str]:
    """Return the names of the tensors outside of all weights. Raises CheckpointError if a part is missing."""
    parts = set()
    for name, entry in layers.items():
        parts |= set(own := part_names(name, entry))
        if missing := [key for key in own if key not in tensors]:
            raise CheckpointError(f"{name}: the tensor {missing[0]!r} is missing")
    return tensors.keys() - parts


def part_names(name: str, entry: LayerEntry) -> list[str]:
    """Return the names of the tensors of a layer's weight."""
    parts = [join(name, "weight", part) for part in _PARTS[entry.format]] or [join(name, "weight")]
    return parts + [join(name, "weight", _SCALE)] * bool(entry.dequantized)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the layer in whatever is wrong with its parts."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{name or '(root)'}: {error}") from None


def _check_parts(entry: LayerEntry, parts: list[Tensor]) -> None:
    stored = StoredWeight(entry, parts)
    values, scale = stored.values, stored.scale
    if scale is not None:
        check_quantized(values, scale, entry.out_features)
    if entry.format == "csr":
        check_csr(CSR(*parts[:3]), entry.shape)
    elif entry.format == "bitmask":
        check_bitmask(Bitmask(*parts[:2]), entry.shape)
    elif values.shape != entry.shape:
        raise ValueError(f"a dense weight must be of shape {entry.shape}, got {values.dtype} {tuple(values.shape)}")
    if scale is None and not values.is_floating_point():
        raise ValueError(f"values must be floating, got {values.dtype} {tuple(values.shape)}")


def not_zero(weight: Tensor) -> Tensor:
    """Return a mask of weights with any bit set: -0.0 is stored like any other value."""
    return (weight != 0) | weight.signbit()

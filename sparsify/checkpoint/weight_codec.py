"""One layer's weight in a file: which format it takes, and the tensors it is made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsify.checkpoint.container import LayerEntry
from sparsify.conversion.converters.table import join, matrices
from sparsify.errors import CheckpointError
from sparsify.kernels.csr import (
    CSR,
    Bitmask,
    bitmask_bytes,
    bitmask_to_csr,
    check_csr,
    csr_bytes,
    csr_to_dense,
    dense_to_csr,
    pack_bitmask,
)
from sparsify.layers import Masked, Packed

#: The tensors that hold the weight of layer NAME: NAME.weight.PART, or NAME.weight itself for "dense".
_PARTS: dict[str, tuple[str, ...]] = {"csr": CSR._fields, "bitmask": Bitmask._fields, "dense": ()}


def pack_layer(module: nn.Module) -> tuple[LayerEntry, dict[str, Tensor]]:
    """Choose the smallest format for a layer's weight, and pack it."""
    if isinstance(module, Packed):
        becomes = "CSRLinear"
        weight, mask = csr_to_dense(module.csr, module.shape)
    elif isinstance(module, Masked):
        becomes = "SparseLinear"
        weight, mask = module.weight_matrix, module.matrix(module.mask)
    else:
        becomes = "Linear"
        weight = matrices(module)[""].detach()
        mask = _not_zero(weight)
    shape, n_kept, itemsize = (weight.shape[0], weight.shape[1]), int(mask.sum()), weight.element_size()
    sizes = {"bitmask": bitmask_bytes(shape, n_kept, itemsize), "csr": csr_bytes(shape, n_kept, itemsize)}
    if torch.equal(mask, _not_zero(weight)):  # only then do dense weights say which are kept
        sizes["dense"] = weight.numel() * itemsize
    chosen = min(sizes, key=lambda name: sizes[name])
    entry = LayerEntry.model_validate(
        {"module": becomes, "format": chosen, "out_features": shape[0], "in_features": shape[1]}
    )
    if chosen == "dense":
        return entry, {"": weight}
    return entry, (dense_to_csr if chosen == "csr" else pack_bitmask)(weight, mask)._asdict()


def packed_bytes(shape: tuple[int, int], n_kept: int, itemsize: int) -> int:
    """Return the bytes of a weight in its smallest format."""
    n_dense = shape[0] * shape[1] * itemsize
    return min(csr_bytes(shape, n_kept, itemsize), bitmask_bytes(shape, n_kept, itemsize), n_dense)


def unpack_layer(entry: LayerEntry, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the weight and the mask, both (out_features, in_features), of a layer that was read packed."""
    csr = take_weights({"": entry}, dict(tensors))[""]
    return csr_to_dense(csr, entry.shape)


def take_weights(layers: Mapping[str, LayerEntry], tensors: dict[str, Tensor]) -> dict[str, CSR]:
    """Take the parts of every packed weight out of `tensors`, check them, and return them as CSR."""
    weights = {}
    for name, entry in layers.items():
        parts = part_names(name, entry)
        if missing := [key for key in parts if key not in tensors]:
            raise CheckpointError(f"{name}: the tensor {missing[0]!r} is missing")
        taken = [tensors.pop(key) for key in parts]
        try:
            weights[name] = _as_csr(entry, taken)
        except ValueError as error:
            raise CheckpointError(f"{name or '(root)'}: {error}") from None
    return weights


def part_names(name: str, entry: LayerEntry) -> list[str]:
    """Return the names of the tensors that hold a layer's weight."""
    return [join(name, "weight", part) for part in _PARTS[entry.format]] or [join(name, "weight")]


def _as_csr(entry: LayerEntry, parts: list[Tensor]) -> CSR:
    if entry.format == "csr":
        csr = CSR(*parts)
        check_csr(csr, entry.shape)
        return csr
    if entry.format == "bitmask":
        return bitmask_to_csr(Bitmask(*parts), entry.shape)
    if parts[0].shape != entry.shape or not parts[0].is_floating_point():
        raise ValueError(
            f"a dense weight must be floating of shape {entry.shape}, got {parts[0].dtype} {tuple(parts[0].shape)}"
        )
    return dense_to_csr(parts[0], _not_zero(parts[0]))


def _not_zero(weight: Tensor) -> Tensor:
    """Say which weights have any bit set: -0.0 is stored like any other value."""
    return (weight != 0) | weight.signbit()

"""The kinds of modules that convert: one small file each, and the table of them all."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor, nn

from sparsify.conversion.converters.attention import ATTENTION, ENCODER, followers, reads_weights
from sparsify.conversion.converters.base import Kind
from sparsify.conversion.converters.conv2d import CONV2D
from sparsify.conversion.converters.functional import TRANSPOSED
from sparsify.conversion.converters.linear import LINEAR
from sparsify.layers import Masked, Packed, Tied

__all__ = [
    "Kind",
    "chosen_kinds",
    "followers",
    "join",
    "kind_of",
    "kinds",
    "masked_as",
    "matrices",
    "reads_weights",
]


def kinds() -> tuple[Kind, ...]:
    """Return every kind that a model can hold in this process; one that holds layers of other kinds comes after them.

    Those of an optional package are among them once that is imported: no model holds one of its modules before.
    """
    found = [LINEAR, TRANSPOSED, CONV2D]
    if "transformers.pytorch_utils" in sys.modules:
        from sparsify.conversion.converters.conv1d import CONV1D

        found.append(CONV1D)
    return (*found, ATTENTION, ENCODER)


def chosen_kinds(types: type[nn.Module] | Sequence[type[nn.Module]] | None) -> tuple[Kind, ...]:
    """Return the kinds of these dense types; of None, those that convert takes unasked. Raises ValueError."""
    if types is None:
        return tuple(kind for kind in kinds() if kind.unasked)
    wanted = types if isinstance(types, Sequence) else (types,)
    known = {kind.dense: kind for kind in kinds()}
    if odd := [one for one in wanted if one not in known]:
        names = ", ".join(one.__name__ for one in known)
        raise ValueError(f"types: {getattr(odd[0], '__name__', odd[0])} is none of the types that convert: {names}")
    if not wanted:
        raise ValueError("types is empty; leave it out for all types")
    return tuple(known[one] for one in wanted)


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a module, dense or converted, or None."""
    found = [kind for kind in kinds() if isinstance(module, (kind.dense, kind.sparse))]
    return found[0] if found else None


def masked_as(layer: Masked | Packed) -> Kind:
    """Return the kind of a layer that is masked, or was before it was exported."""
    masked_type = layer.masked_type if isinstance(layer, Packed) else type(layer)
    return next(kind for kind in kinds() if issubclass(masked_type, kind.sparse))


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights, (out_features, in_features), that a module is pruned in, or would be, by layer name below it.

    Empty for a module of no kind.
    """
    if isinstance(module, Masked):
        return {"": module.weight_matrix}
    kind = None if isinstance(module, Tied) else kind_of(module)
    return {} if kind is None or isinstance(module, kind.sparse) else kind.matrices(module)


def join(*names: str) -> str:
    """Join names to a dotted one, leaving out those of the root.

    >>> join("", "0", "weight")
    '0.weight'
    """
    return ".".join(name for name in names if name)

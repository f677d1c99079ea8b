"""The kinds of modules that convert: one small file each, and the table of them all."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor, nn

from sparsify.conversion.converters.attention import ATTENTION, ENCODER, bypasses_its_layers, dependent_modules
from sparsify.conversion.converters.base import Converter
from sparsify.conversion.converters.conv2d import CONV2D
from sparsify.conversion.converters.functional import TRANSPOSED
from sparsify.conversion.converters.linear import LINEAR
from sparsify.layers import MaskedLayer, PackedLayer, Tied

__all__ = [
    "Converter",
    "bypasses_its_layers",
    "converter_for",
    "converter_of_layer",
    "converters",
    "dependent_modules",
    "join",
    "matrices",
    "select_converters",
]


def converters() -> tuple[Converter, ...]:
    """Return every kind that a model can hold in this process; one that holds layers of other kinds comes after them.

    Those of an optional package are among them once that is imported: no model holds one of its modules before.
    """
    found = [LINEAR, TRANSPOSED, CONV2D]
    if "transformers.pytorch_utils" in sys.modules:
        from sparsify.conversion.converters.conv1d import CONV1D

        found.append(CONV1D)
    return (*found, ATTENTION, ENCODER)


def select_converters(types: type[nn.Module] | Sequence[type[nn.Module]] | None) -> tuple[Converter, ...]:
    """Return the kinds of these dense types; of None, those that convert takes unasked. Raises ValueError."""
    if types is None:
        return tuple(converter for converter in converters() if converter.by_default)
    wanted = types if isinstance(types, Sequence) else (types,)
    known = {converter.dense: converter for converter in converters()}
    if odd := [one for one in wanted if one not in known]:
        names = ", ".join(one.__name__ for one in known if one is not TRANSPOSED.dense)
        raise ValueError(f"types: {getattr(odd[0], '__name__', odd[0])} is none of the types that convert: {names}")
    if not wanted:
        raise ValueError("types is empty; leave it out for all types")
    return tuple(known[one] for one in wanted)


def converter_for(module: nn.Module) -> Converter | None:
    """Return the kind of a module, dense or converted, or None."""
    found = [converter for converter in converters() if isinstance(module, (converter.dense, converter.sparse))]
    return found[0] if found else None


def converter_of_layer(layer: MaskedLayer | PackedLayer) -> Converter:
    """Return the kind of a layer that is masked, or was before it was exported."""
    masked_type = layer.masked_type if isinstance(layer, PackedLayer) else type(layer)
    return next(converter for converter in converters() if issubclass(masked_type, converter.sparse))


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights, (out_features, in_features), that a module is pruned in, or would be, by layer name below it.

    Empty for a module of no kind.
    """
    if isinstance(module, MaskedLayer):
        return {"": module.weight_matrix}
    converter = None if isinstance(module, Tied) else converter_for(module)
    return {} if converter is None or isinstance(module, converter.sparse) else converter.matrices(module)


def join(*names: str) -> str:
    """Join names to a dotted one, leaving out those of the root.

    >>> join("", "0", "weight")
    '0.weight'
    """
    return ".".join(name for name in names if name)

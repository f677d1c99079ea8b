"""The table of all converters; each has a small file of its own."""

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
    "dense_types",
    "dependent_modules",
    "matrices",
    "select_converters",
]


def converters() -> tuple[Converter, ...]:
    """Return every converter; one for modules with layers inside comes after the converters of those layers.

    Converters for an optional package are included once it is imported: before, no model has one of its modules.
    """
    table = [LINEAR, TRANSPOSED, CONV2D]
    if "transformers.pytorch_utils" in sys.modules:
        from sparsify.conversion.converters.conv1d import CONV1D

        table.append(CONV1D)
    return (*table, ATTENTION, ENCODER)


def select_converters(types: type[nn.Module] | Sequence[type[nn.Module]] | None) -> tuple[Converter, ...]:
    """Return the converters of these dense types, or the default ones for None. Raises ValueError."""
    if types is None:
        return tuple(converter for converter in converters() if converter.by_default)
    wanted = types if isinstance(types, Sequence) else (types,)
    known = {converter.dense: converter for converter in converters()}
    if odd := [dense for dense in wanted if dense not in known]:
        names = ", ".join(dense.__name__ for dense in known if dense is not TRANSPOSED.dense)
        raise ValueError(f"types: {getattr(odd[0], '__name__', odd[0])} is none of the types that convert: {names}")
    if not wanted:
        raise ValueError("types is empty; leave it out for all types")
    return tuple(known[dense] for dense in wanted)


def dense_types(names: Sequence[str]) -> tuple[type[nn.Module], ...]:
    """Return the dense types of these names ("Linear", "Conv2d"). Raises ValueError with the known names."""
    known = {c.dense.__name__: c.dense for c in converters() if c.dense is not TRANSPOSED.dense}
    if odd := [name for name in names if name not in known]:
        raise ValueError(f"types: {odd[0]!r} is none of the types that convert: {', '.join(known)}")
    return tuple(known[name] for name in names)


def converter_for(module: nn.Module) -> Converter | None:
    """Return the converter of a module, dense or converted, or None."""
    matching = (c for c in converters() if isinstance(module, (c.dense, c.sparse)))
    return next(matching, None)


def converter_of_layer(layer: MaskedLayer | PackedLayer) -> Converter:
    """Return the converter of a masked or packed layer."""
    masked_type = layer.masked_type if isinstance(layer, PackedLayer) else type(layer)
    return next(converter for converter in converters() if issubclass(masked_type, converter.sparse))


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's weights to be pruned, (out_features, in_features), by layer name below the module.

    Empty for a module without a converter.
    """
    if isinstance(module, MaskedLayer):
        return {"": module.weight_matrix}
    converter = None if isinstance(module, Tied) else converter_for(module)
    return {} if converter is None or isinstance(module, converter.sparse) else converter.matrices(module)

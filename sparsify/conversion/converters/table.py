"""The table of all converters; each has a small file of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsify.conversion.converters.attention import ATTENTION, ENCODER, bypasses_its_layers, dependent_modules
from sparsify.conversion.converters.base import Converter
from sparsify.conversion.converters.convolution import CONVOLUTIONS
from sparsify.conversion.converters.embedding import BILINEAR, TABLES
from sparsify.conversion.converters.functional import TRANSPOSED
from sparsify.conversion.converters.linear import LINEAR
from sparsify.conversion.converters.recurrent import HELD, RECURRENT
from sparsify.layers import MaskedLayer, PackedLayer, Tied

__all__ = [
    "Converter",
    "bypasses_its_layers",
    "converter_for",
    "converter_of_layer",
    "converters",
    "default_converters",
    "dense_types",
    "dependent_modules",
    "matrices",
    "packed_type",
    "select_converters",
]


#: Types that stand only inside of unfused modules.
_INSIDE = (TRANSPOSED.dense, HELD.dense)


def converters() -> tuple[Converter, ...]:
    """Return every converter; one for modules with layers inside comes after the converters of those layers.

    Converters for an optional package are included once it is imported: before, no model has one of its modules.
    """
    table = [LINEAR, TRANSPOSED, HELD, *CONVOLUTIONS, *TABLES, BILINEAR]
    if "transformers.pytorch_utils" in sys.modules:
        from sparsify.conversion.converters.conv1d import CONV1D

        table.append(CONV1D)
    return (*table, *RECURRENT, ATTENTION, ENCODER)


def select_converters(
    model: nn.Module, types: type[nn.Module] | Sequence[type[nn.Module]] | None
) -> tuple[Converter, ...]:
    """Return the converters of these dense types, or for None the default ones of a model. Raises ValueError."""
    if types is None:
        return default_converters(model)
    wanted = types if isinstance(types, Sequence) else (types,)
    known = {converter.dense: converter for converter in converters()}
    if odd := [dense for dense in wanted if dense not in known]:
        names = ", ".join(dense.__name__ for dense in known if dense not in _INSIDE)
        raise ValueError(f"types: {getattr(odd[0], '__name__', odd[0])} is none of the types that convert: {names}")
    if not wanted:
        raise ValueError("types is empty; leave it out for all types")
    chosen = tuple(known[dense] for dense in wanted)
    return (*chosen, HELD) if any(converter in RECURRENT for converter in chosen) else chosen


def default_converters(model: nn.Module) -> tuple[Converter, ...]:
    """Return the converters in use without `types`: all for a model made of convolutions, else without those.

    A model is made of convolutions if they have more weights than its linear layers, or are more in number.

    >>> models = [nn.Sequential(nn.Conv2d(1, n, 1), nn.Linear(2, 2)) for n in (2, 5)]
    >>> [any(converter.dense is nn.Conv2d for converter in default_converters(model)) for model in models]
    [False, True]
    """
    sizes: dict[bool, list[int]] = {True: [], False: []}  # of convolutions, and of other layers
    for module in model.modules():
        if isinstance(module, PackedLayer):
            sizes[converter_of_layer(module) in CONVOLUTIONS].append(module.in_features * module.out_features)
        elif (converter := converter_for(module)) is not None and (converter.by_default or converter in CONVOLUTIONS):
            own = [p for p in module._parameters.values() if p is not None and not is_lazy(p) and p.ndim > 1]
            sizes[converter in CONVOLUTIONS].extend(p.numel() for p in own)
    ours, others = sizes[True], sizes[False]
    made_of_convolutions = sum(ours) > sum(others) or len(ours) > len(others)
    return tuple(c for c in converters() if c.by_default or (made_of_convolutions and c in CONVOLUTIONS))


def dense_types(names: Sequence[str]) -> tuple[type[nn.Module], ...]:
    """Return the dense types of these names ("Linear", "Conv2d"). Raises ValueError with the known names."""
    known = {c.dense.__name__: c.dense for c in converters() if c.dense not in _INSIDE}
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


def packed_type(layer: nn.Module) -> type[PackedLayer] | None:
    """Return the type of a layer, masked or dense, after export; None if its export is dense, with zeros."""
    converter = converter_for(layer)
    if converter is None or converter.packed is None or not issubclass(converter.sparse, MaskedLayer):
        return None
    return converter.packed if converter.packed.packs(converter.sparse.settings_of(layer)) else None


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's weights to be pruned, (out_features, in_features), by layer name below the module.

    Empty for a module without a converter.
    """
    if isinstance(module, MaskedLayer):
        return {"": module.weight_matrix}
    converter = None if isinstance(module, Tied) else converter_for(module)
    return {} if converter is None or isinstance(module, converter.sparse) else converter.matrices(module)

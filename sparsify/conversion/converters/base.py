"""Converter: the code from one type of module to masked layers and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsify.kernels import FORMS, part_names
from sparsify.layers import CSRLinear, PackedLayer

#: Names on instances of masked and packed layers, beside the attributes of their classes.
OF_LAYERS = frozenset(
    {"mask", "form", "wanted_form", "n_kept", "activation"}
    | {part for form in FORMS for part in part_names(form, quantized=True)}
)

#: A module of the type `dense` or `sparse`. Any, so that each function can name its own type.
_Of = Any


@dataclass(frozen=True)
class Converter:
    """The rules for modules of one type. The functions change nothing outside of their argument.

    dense, sparse: the type before `convert`, and the type after it.
    check(dense): raise ValueError, with the reason, if the module must stay dense.
    matrices(dense): the present weights, (out_features, in_features), of each of the module's layers.
    to_sparse(dense): make the converted module, over the same Parameters; nothing is pruned yet.
    to_dense(sparse): make the dense module, with zeros.
    layers(dense): the names of the layers with those weights, below the module; "" is the module itself. A layer still
        dense after to_sparse is converted by a converter of its own.
    packed: the type of each of those layers after export, if it `packs` them; None: dense, with zeros.
    by_default: True if convert needs no `types` to take such modules, in a model of any kind.
    """

    dense: type[nn.Module]
    sparse: type[nn.Module]
    check: Callable[[_Of], None]
    matrices: Callable[[_Of], dict[str, Tensor]]
    to_sparse: Callable[[_Of], nn.Module]
    to_dense: Callable[[_Of], nn.Module]
    layers: Callable[[_Of], tuple[str, ...]] = lambda _: ("",)
    packed: type[PackedLayer] | None = CSRLinear
    by_default: bool = True

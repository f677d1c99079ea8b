"""Kind: what convert has to know of one type of module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsify.kernels import FORMS
from sparsify.layers import CSRLinear, PackedLayer

#: What instances of Masked and Packed layers have, beside the attributes of their classes.
OF_LAYERS = frozenset(
    {"mask", "form", "wanted_form", "n_kept", "activation", "choice", "fit"}
    | {part for parts in FORMS.values() for part in parts}
)

#: The module is of the kind's own type; what stands here instead is Any, because functions of a type take that type.
_Of = Any


@dataclass(frozen=True)
class Converter:
    """How modules of one type convert and come back. The functions change nothing outside the module they get.

    dense, sparse: the type convert looks for, and the one it becomes.
    check(dense): raise ValueError, saying why, if the module must stay dense.
    matrices(dense): its weights as they are now, (out_features, in_features), for each of its layers.
    to_sparse(dense): make what the module becomes, over the same Parameters; nothing is pruned yet.
    to_dense(sparse): make what it was, with zeros.
    layers(dense): the names of the layers with those weights, below the module; "" is the module itself. Layers below
        it that to_sparse leaves dense are converted by a kind of their own.
    packed: what each of those layers becomes when it is exported.
    unasked: whether convert takes it without being told to by `types`.
    """

    dense: type[nn.Module]
    sparse: type[nn.Module]
    check: Callable[[_Of], None]
    matrices: Callable[[_Of], dict[str, Tensor]]
    to_sparse: Callable[[_Of], nn.Module]
    to_dense: Callable[[_Of], nn.Module]
    layers: Callable[[_Of], tuple[str, ...]] = lambda _: ("",)
    packed: type[PackedLayer] = CSRLinear
    by_default: bool = True

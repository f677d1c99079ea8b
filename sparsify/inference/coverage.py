"""Coverage of a model: the share of its parameters and of its work in layers of this package, and the rest by type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsify.conversion.left_dense import TABLES, hint, own_weights
from sparsify.inference.multiply_adds import memory_of, multiply_adds
from sparsify.layers import Int8Embedding, PackedLayer

#: So many types of the rest are named, the largest first.
_MOST_TYPES = 4


@dataclass(frozen=True)
class Rest:
    """All modules of one type outside of the layers; `largest` is the name of the one with most parameters."""

    type: str
    n_modules: int
    n_parameters: int
    largest: str


@dataclass(frozen=True)
class Coverage:
    """The share of a model in its masked and exported layers; `str()` of it is two sentences.

    n_parameters: of the whole model, as before packing. n_covered: those in weights of the layers.
    n_multiply_adds, n_covered_multiply_adds: of one run of an example, dense; None without one.
    rest: everything else, the most parameters first.
    """

    n_parameters: int
    n_covered: int
    rest: tuple[Rest, ...]
    n_multiply_adds: int | None = None
    n_covered_multiply_adds: int | None = None

    @property
    def of_parameters(self) -> float:
        """The share of the parameters."""
        return self.n_covered / max(self.n_parameters, 1)

    @property
    def of_multiply_adds(self) -> float | None:
        """The share of the multiply-adds; None without an example."""
        if self.n_multiply_adds is None or self.n_covered_multiply_adds is None:
            return None
        return self.n_covered_multiply_adds / max(self.n_multiply_adds, 1)

    @property
    def dense(self) -> str:
        """The rest by type, with shares of the parameters; "" if there is none."""
        shown = [
            f"{part.n_parameters / max(self.n_parameters, 1):.1%} in "
            + (f"{part.n_modules} {part.type}, the largest " if part.n_modules > 1 else f"{part.type} ")
            + (part.largest or "(root)")
            for part in self.rest[:_MOST_TYPES]
        ]
        more = sum(part.n_parameters for part in self.rest[_MOST_TYPES:]) / max(self.n_parameters, 1)
        return "; ".join([*shown, *([f"{more:.1%} in others"] if more else [])])

    def __str__(self) -> str:
        work = "" if self.of_multiply_adds is None else f" and {self.of_multiply_adds:.1%} of its multiply-adds"
        first = f"Pruned layers hold {self.of_parameters:.1%} of the model's {self.n_parameters:,} parameters{work}."
        return f"{first} Dense: {self.dense}." if self.rest else first


def coverage(model: nn.Module, layers: Collection[nn.Module], example: Any = None) -> Coverage:
    """Return the coverage of a model by some of its layers, masked, exported or dense.

    example: a typical input, on which the model then runs once. Raises ValueError if it does not.
    """
    weights = {id(weight): weight for layer in layers if (weight := _weight(layer)) is not None}
    n_covered = sum({id(_weight(layer)): _n_weights(layer) for layer in layers}.values())
    sizes: Counter[str] = Counter()
    n_modules: Counter[str] = Counter()
    largest: dict[str, tuple[int, str]] = {}
    seen = set(weights)
    for name, module in model.named_modules():
        tensors = [*module._parameters.values(), module.values if isinstance(module, Int8Embedding) else None]
        own = {id(t): t for t in tensors if t is not None and not is_lazy(t) and id(t) not in seen}
        if own:
            seen |= own.keys()
            kind, n = type(module).__name__, sum(tensor.numel() for tensor in own.values())
            sizes[kind] += n
            n_modules[kind] += 1
            largest[kind] = max(largest.get(kind, (-1, "")), (n, name), key=lambda pair: pair[0])
    counts = None if example is None else multiply_adds(model, example)
    return Coverage(
        n_parameters=n_covered + sizes.total(),
        n_covered=n_covered,
        rest=tuple(Rest(kind, n_modules[kind], n, largest[kind][1]) for kind, n in sizes.most_common()),
        n_multiply_adds=None if counts is None else counts.total(),
        n_covered_multiply_adds=None
        if counts is None
        else sum(counts[m] for m in set(map(memory_of, weights.values()))),
    )


def notice(model: nn.Module, layers: Collection[nn.Module], example: Any = None) -> str:
    """Return a notice of the coverage of a model, if most of it is not covered; "" else.

    Most: more weights outside of the layers than in them, tables of Embeddings left out, or more than half of the
    multiply-adds of the example.
    """
    try:
        found = coverage(model, layers, example)
    except ValueError:  # it does not run under a counter
        found = coverage(model, layers)
    known = {id(weight) for layer in layers if (weight := _weight(layer)) is not None}
    outside = [m for m in model.modules() if any(id(weight) not in known for weight in own_weights(m))]
    outside = [module for module in outside if not isinstance(module, TABLES)]
    n_outside = sum(weight.numel() for module in outside for weight in own_weights(module) if id(weight) not in known)
    work = found.of_multiply_adds
    if n_outside <= found.n_covered and (work is None or work >= 0.5):
        return ""
    return f"{str(found).rstrip('.')}{hint(outside, functional=False)}"


def _weight(layer: nn.Module) -> Tensor | None:
    """Return the tensor that stands for a layer's weight: the values, if it is packed."""
    return layer.values if isinstance(layer, PackedLayer) else layer._parameters.get("weight")


def _n_weights(layer: nn.Module) -> int:
    """Return the number of a layer's weights, as before packing."""
    if isinstance(layer, PackedLayer):
        return layer.in_features * layer.out_features
    weight = layer._parameters.get("weight")
    return 0 if weight is None else weight.numel()

"""The options of a pruning as one object, and the specification of each layer derived from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sparsify.layer_names import matching
from sparsify.masking.allocation import (
    ALLOCATIONS,
    DEPTH,
    MEASURED_ALLOCATIONS,
    blocks_in_order,
    by_depth,
    capped,
    check_room,
    check_sparsity,
    depth_spread,
    erk,
    n_removed,
    uniform,
)
from sparsify.masking.methods.registry import (
    SOLVERS,
    Method,
    method_label,
    needs_products,
    resolve_method,
    takes_seed,
)
from sparsify.masking.patterns import Pattern, check_fits, parse_pattern

Allocation = str | Mapping[str, float]
#: Share a target: (units of each layer, sparsity of all of them) -> removed units of each layer.
Allocate = Callable[[Mapping[str, int], float], Mapping[str, int]]


@dataclass(frozen=True)
class LayerSpec:
    """The specification of one layer: `method` removes `n_removed` of its units; `refit` changes the kept weights.

    With `correct` the layer aims at the outputs of the dense model, and makes up for the losses of earlier layers. With
    `swap` kept and removed weights change places first where that lowers the error of the layer's outputs.
    of_matrices: the removed units of each matrix in a layer of several, as of experts; empty: not told apart.
    """

    method: str | Method
    pattern: Pattern
    n_removed: int
    refit: bool = False
    correct: bool = False
    seed: int | None = None
    swap: bool = False
    of_matrices: tuple[int, ...] = ()

    def chooses(self, shape: tuple[int, int]) -> bool:
        """Return whether the method has a choice in a layer of this shape: it loses some units, and not all."""
        return self.pattern.is_nm or 0 < self.n_removed < self.pattern.n_units(shape)

    @property
    def needs_products(self) -> bool:
        """True if the method or the refit looks at the Gram matrix off its diagonal."""
        return self.refit or self.correct or self.swap or needs_products(self.method)

    def empties(self, shape: tuple[int, int]) -> bool:
        """Return whether a layer of this shape loses all its weights."""
        return 0 < self.pattern.n_units(shape) == self.n_removed

    def n_zeros(self, shape: tuple[int, int]) -> int:
        """Return the number of weights removed from a layer of this shape."""
        return self.n_removed * math.prod(self.pattern.unit_shape(shape))


@dataclass(frozen=True)
class PruningSpec:
    """The options of `sparsify.prune` for masks and kept weights; `check_options` refuses those that contradict."""

    sparsity: float | None = None
    method: str | Method = "magnitude"
    pattern: str = "unstructured"
    allocation: Allocation = "uniform"
    max_sparsity: float | None = None
    refit: bool = False
    correct: bool = False
    seed: int | None = None
    swap: bool = False

    @property
    def parsed_pattern(self) -> Pattern:
        """The pattern, parsed."""
        return parse_pattern(self.pattern)

    @property
    def is_measured(self) -> bool:
        """True if the allocation takes more than shapes: the weights ("global"), or calibration data."""
        return self.allocation in ("global", *MEASURED_ALLOCATIONS)

    @property
    def target(self) -> float:
        """The sparsity, in specifications that need one (`check_options`)."""
        assert self.sparsity is not None
        return float(self.sparsity)

    def for_layer(self, n_removed: int) -> LayerSpec:
        """Return the specification of a layer with so many removed units."""
        return LayerSpec(self.method, self.parsed_pattern, n_removed, self.refit, self.correct, self.seed, self.swap)


def layer_specs(
    spec: PruningSpec, shapes: Mapping[str, tuple[int, int]], allocate: Allocate | None = None
) -> dict[str, LayerSpec]:
    """Return the specification of each layer, from the shapes (out, in) of all layers under the target.

    A measured allocation is given as `allocate`. Raises ValueError as `check_spec` does, and for a measured allocation
    without `allocate`.

    >>> specs = layer_specs(PruningSpec(0.8, allocation="erk"), {"a": (10, 10), "b": (20, 20)})
    >>> {name: layer.n_removed for name, layer in specs.items()}
    {'a': 67, 'b': 333}
    """
    check_spec(spec, shapes)
    pattern = spec.parsed_pattern
    n_units = {name: pattern.n_units(shape) for name, shape in shapes.items()}
    if pattern.is_nm:
        removed = {name: n // pattern.group * (pattern.group - pattern.keep) for name, n in n_units.items()}
    elif isinstance(spec.allocation, Mapping):
        targets = layer_targets(spec.allocation, shapes)
        removed = {name: n_removed(targets[name], n) for name, n in n_units.items()}
    elif spec.allocation == "uniform" or spec.target == 0:
        removed = uniform(n_units, spec.target)
    else:
        if spec.allocation == "erk":
            allocate = lambda n_units, sparsity: erk(n_units, shapes, sparsity)  # noqa: E731
        elif spread := depth_spread(spec.allocation):
            numbers = blocks_in_order(shapes)
            allocate = lambda n_units, sparsity: by_depth(n_units, numbers, sparsity, spread)  # noqa: E731
        if allocate is None:
            raise ValueError(f"allocation {spec.allocation!r} is measured on the model and its data, not on shapes")
        removed = capped(allocate, n_units, spec.target, spec.max_sparsity)
    return {name: spec.for_layer(n) for name, n in removed.items()}


def merged(specs: Mapping[str, LayerSpec], parts: Mapping[str, tuple[str, ...]]) -> dict[str, LayerSpec]:
    """Return the specifications of layers from those of their matrices; parts: the names of a layer's matrices.

    >>> specs = layer_specs(PruningSpec(0.5), {"a": (2, 2), "b.0": (2, 2), "b.1": (2, 2)})
    >>> {name: (one.n_removed, one.of_matrices) for name, one in merged(specs, {"b": ("b.0", "b.1")}).items()}
    {'a': (2, ()), 'b': (4, (2, 2))}
    """
    owners = {part: name for name, own in parts.items() for part in own}
    together = dict.fromkeys(owners.get(name, name) for name in specs)
    found = {}
    for name in together:
        if name in parts:
            counts = tuple(specs[part].n_removed for part in parts[name])
            found[name] = replace(specs[parts[name][0]], n_removed=sum(counts), of_matrices=counts)
        else:
            found[name] = specs[name]
    return found


def check_options(spec: PruningSpec) -> None:
    """Raise ValueError for options wrong in any model: unknown, contradictory, or without effect."""
    if spec.method not in SOLVERS:
        resolve_method(spec.method)
        if spec.correct and not spec.refit:
            raise ValueError(
                f"correct=True has no effect with method {spec.method!r} unless refit=True changes weights"
            )
    if spec.swap and not (spec.parsed_pattern.is_nm or spec.parsed_pattern.block == (1, 1)):
        raise ValueError(f"swap=True exchanges single weights, and pattern {spec.pattern} removes larger units")
    if spec.seed is not None and not takes_seed(spec.method):
        raise ValueError(
            f"seed={spec.seed} has no effect with method {method_label(spec.method)!r}, which draws no random numbers"
        )
    if spec.max_sparsity is not None:
        _check_cap(spec)
    if spec.parsed_pattern.is_nm:
        _check_nm(spec)
    elif isinstance(spec.allocation, Mapping):
        if spec.sparsity is not None:
            raise ValueError(
                f"sparsity={spec.sparsity} has no effect beside an allocation for each layer; leave it out"
            )
        for name, sparsity in spec.allocation.items():
            check_sparsity(sparsity, f"the sparsity of {name!r}")
    elif spec.allocation not in (*ALLOCATIONS, *MEASURED_ALLOCATIONS) and depth_spread(spec.allocation) is None:
        known = ", ".join((*ALLOCATIONS, *MEASURED_ALLOCATIONS, f"{DEPTH}0.1"))
        raise ValueError(f"allocation {spec.allocation!r} is none of: {known}, or a dict of layer patterns")
    elif spec.sparsity is None:
        raise ValueError("a sparsity is needed (a fraction between 0 and 1)")
    else:
        check_sparsity(spec.sparsity)


def check_spec(spec: PruningSpec, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError, naming the layer, if layers of these shapes (out, in) cannot be pruned to the specification."""
    check_options(spec)
    pattern = spec.parsed_pattern
    for name, shape in shapes.items():
        check_fits(pattern, shape, name)
    if isinstance(spec.allocation, Mapping):
        _check_covered(spec.allocation, shapes)
    elif spec.allocation != "uniform":
        _check_unit_sizes(spec, shapes)
        if depth_spread(spec.allocation) and max(blocks_in_order(shapes).values(), default=0) == 0:
            raise ValueError(f"allocation {spec.allocation!r} has no effect on layers of one block; use 'uniform'")
        check_room({name: pattern.n_units(shape) for name, shape in shapes.items()}, spec.target, spec.max_sparsity)


def layer_targets(allocation: Mapping[str, float], names: Mapping[str, object]) -> dict[str, float]:
    """Return each layer's sparsity, by the first matching pattern; every layer and pattern must match."""
    _check_covered(allocation, names)
    targets: dict[str, float] = {}
    for pattern, sparsity in allocation.items():
        for name in matching(pattern, list(names)):
            targets.setdefault(name, float(sparsity))
    return {name: targets[name] for name in names}


def _check_covered(allocation: Mapping[str, float], names: Mapping[str, object]) -> None:
    """Raise ValueError for a pattern without a layer, and for a layer without a pattern."""
    covered = {name for pattern in allocation for name in matching(pattern, list(names))}
    if missing := [name for name in names if name not in covered]:
        raise ValueError(
            f"the allocation says nothing for {missing[0]!r} ({len(missing)} layers); "
            "add '*' as its last pattern, or exclude them"
        )


def _check_unit_sizes(spec: PruningSpec, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError if units of different sizes would share one target."""
    sizes = {name: math.prod(spec.parsed_pattern.unit_shape(shape)) for name, shape in shapes.items()}
    if len(set(sizes.values())) > 1:
        (small, a), (large, b) = sorted(sizes.items(), key=lambda item: item[1])[:: len(sizes) - 1]
        raise ValueError(
            f"allocation {spec.allocation!r} needs units of one size, but with pattern {spec.pattern!r} a unit has "
            f"{a} weights in {small} and {b} in {large}; use allocation 'uniform'"
        )


def _check_cap(spec: PruningSpec) -> None:
    """Raise ValueError if `max_sparsity` has no effect, or is no fraction."""
    pattern, allocation = spec.parsed_pattern, spec.allocation
    if pattern.is_nm or allocation == "uniform" or isinstance(allocation, Mapping):
        rule = f"pattern {pattern.text}" if pattern.is_nm else f"allocation {allocation!r}"
        raise ValueError(
            f"max_sparsity={spec.max_sparsity} has no effect with {rule}, which says what each layer loses"
        )
    check_sparsity(spec.max_sparsity, "max_sparsity")


def _check_nm(spec: PruningSpec) -> None:
    """Raise ValueError if allocation or sparsity contradict an N:M pattern."""
    pattern, sparsity = spec.parsed_pattern, spec.sparsity
    if spec.allocation != "uniform":
        raise ValueError(
            f"allocation {spec.allocation!r} has no effect with pattern {pattern.text}, which fixes every layer's "
            "sparsity"
        )
    fixed = 1 - pattern.keep / pattern.group
    if sparsity is not None and not math.isclose(check_sparsity(sparsity), fixed, abs_tol=1e-9):
        raise ValueError(f"pattern {pattern.text} means sparsity {fixed:g}, got {sparsity:g}; leave the sparsity out")

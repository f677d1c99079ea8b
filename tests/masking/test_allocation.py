"""One target becomes removed units per layer, exact in sum."""

import itertools
import math

import numpy as np
import pytest
from cases import repeatable
from hypothesis import given
from hypothesis import strategies as st

from sparsify.masking.allocation import blocks_in_order, by_depth, check_sparsity, depth_spread, erk, n_removed, uniform
from sparsify.masking.spec import PruningSpec, layer_specs

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)


@pytest.mark.parametrize("sparsity", [0, 1, 0.0, 1.0, 0.5, np.float64(0.25), np.float32(0.5)])
def test_a_fraction_is_a_sparsity(sparsity: float) -> None:
    checked = check_sparsity(sparsity)
    assert type(checked) is float
    assert checked == sparsity


@pytest.mark.parametrize("sparsity", [-0.1, 1.0001, 90, math.nan, math.inf, True, False, "0.5", None])
def test_anything_else_is_not(sparsity: object) -> None:
    with pytest.raises(ValueError, match="the target must be a fraction between 0 and 1, got"):
        check_sparsity(sparsity, "the target")


@repeatable
@given(st.floats(0, 1), st.integers(0, 10**6))
def test_the_count_is_the_rounded_product(sparsity: float, n_units: int) -> None:
    n = n_removed(sparsity, n_units)
    assert 0 <= n <= n_units
    assert abs(n - sparsity * n_units) <= 0.5


def test_uniform_rounds_each_layer() -> None:
    assert uniform({"a": 7, "b": 3, "c": 0}, 0.9) == {"a": 6, "b": 3, "c": 0}


def run_erk(shapes: list[tuple[int, int]], sparsity: float) -> list[int]:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    return list(erk({name: math.prod(shape) for name, shape in named.items()}, named, sparsity).values())


def reference_erk(shapes: list[tuple[int, int]], n_keep: int) -> list[float]:
    """Find by bisection the scale whose capped densities scale * (in + out) / (in * out) keep n_keep weights."""

    def kept(scale: float) -> list[float]:
        return [min(out * inner, scale * (out + inner)) for out, inner in shapes]

    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(kept(middle)) >= n_keep else (middle, high)
    return kept(high)


@repeatable
@given(SHAPES, st.floats(0, 1))
def test_erk_is_exact_in_sum_and_near_the_formula_per_layer(shapes: list[tuple[int, int]], sparsity: float) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    removed = run_erk(shapes, sparsity)
    assert sum(removed) == round(sparsity * sum(sizes))
    assert all(0 <= r <= n for r, n in zip(removed, sizes, strict=True))
    for r, n, share in zip(removed, sizes, reference_erk(shapes, sum(sizes) - sum(removed)), strict=True):
        assert abs((n - r) - share) < 1 + 1e-6


@repeatable
@given(SHAPES)
def test_a_higher_target_takes_from_every_layer_at_least_as_much(shapes: list[tuple[int, int]]) -> None:
    total = sum(math.prod(shape) for shape in shapes)
    steps = [run_erk(shapes, n / total) for n in range(total + 1)]
    for fewer, more in itertools.pairwise(steps):
        assert all(a <= b for a, b in zip(fewer, more, strict=True)), (fewer, more)


def test_erk_leaves_small_layers_denser() -> None:
    small, large = (n / size for n, size in zip(run_erk([(10, 10), (100, 100)], 0.9), (100, 10_000), strict=True))
    assert small < 0.1 < 0.9 < large


def test_equal_layers_share_what_rounding_leaves_in_order() -> None:
    assert run_erk([(2, 2), (2, 2), (2, 2)], 4 / 12) == [1, 1, 2]


def test_erk_of_a_layer_without_units() -> None:
    assert erk({"a": 0, "b": 4}, {"a": (0, 4), "b": (2, 2)}, 0.5) == {"a": 0, "b": 2}


def run_by_depth(units: list[int], sparsity: float, spread: float) -> list[int]:
    """Allocate to layers of one block each."""
    named = {str(i): n for i, n in enumerate(units)}
    return list(by_depth(named, {str(i): i for i in range(len(units))}, sparsity, spread).values())


@repeatable
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted),
    st.floats(-0.99, 0.99),
)
def test_by_depth_is_exact_in_sum_and_never_takes_less_for_more(
    units: list[int], sparsities: list[float], spread: float
) -> None:
    less, more = (run_by_depth(units, sparsity, spread) for sparsity in sparsities)
    for removed, sparsity in zip((less, more), sparsities, strict=True):
        assert sum(removed) == n_removed(sparsity, sum(units))
        assert all(0 <= r <= n for r, n in zip(removed, units, strict=True))
    assert all(a <= b for a, b in zip(less, more, strict=True))


def test_by_depth_rises_in_equal_steps_over_blocks() -> None:
    """Layers of one block share its place; steps that would leave 0 to 1 end there, and the others take the rest."""
    names = ["a.0.q", "a.0.up", "a.1.q", "a.1.up", "a.2.q", "a.2.up"]
    shapes = {name: (10, 10) if name.endswith("q") else (10, 40) for name in names}
    specs = layer_specs(PruningSpec(0.7, allocation="depth:0.2"), shapes)
    assert [spec.n_removed for spec in specs.values()] == [50, 200, 70, 280, 90, 360]
    assert run_by_depth([100, 100], 0.5, -0.25) == [75, 25]
    assert run_by_depth([100, 100, 100], 0.95, 0.2) == [85, 100, 100]
    specs = layer_specs(PruningSpec(0.7, allocation="depth:0.2", max_sparsity=0.8), shapes)
    assert [spec.n_removed for spec in specs.values()] == [55, 220, 75, 300, 80, 320]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "fc"], [0, 1, 1, 2, 3]),
        (["encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_1.mlp.3"], [0, 1]),
        (["0", "2"], [0, 1]),
        ([""], [0]),
    ],
)
def test_blocks_are_numbered_in_order(names: list[str], numbers: list[int]) -> None:
    assert list(blocks_in_order(names).values()) == numbers


@pytest.mark.parametrize("text", ["depth:", "depth:x", "depth:0", "depth:1", "depth:-1.5", "depth:nan"])
def test_a_depth_needs_a_number(text: str) -> None:
    with pytest.raises(ValueError, match="needs a number between -1 and 1"):
        depth_spread(text)


def test_depth_has_no_effect_in_one_block() -> None:
    with pytest.raises(ValueError, match=r"allocation 'depth:0\.1' has no effect on layers of one block"):
        layer_specs(PruningSpec(0.5, allocation="depth:0.1"), {"a.0.q": (4, 4), "a.0.k": (4, 4)})

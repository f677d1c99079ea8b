"""Method, pattern and allocation together: exact counts, nesting, and errors that change nothing."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import DTYPES, PATTERNS, SHAPES, SPARSITIES, repeatable, weight
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsify.masking.allocation import ALLOCATIONS
from sparsify.masking.masks import make_masks
from sparsify.masking.methods.registry import METHODS
from sparsify.masking.patterns import parse_pattern, unit_any, unit_scores
from sparsify.masking.spec import PruningSpec, layer_targets

THREE = {"a": (8, 12), "b": (4, 8), "c": (16, 4)}


def weights_of(shapes: dict[str, tuple[int, int]] = THREE, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: weight(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}


def kept(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}


def n_zeros(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in masks.items()}


def fits(pattern: str, shape: tuple[int, int]) -> bool:
    parsed = parse_pattern(pattern)
    rows, columns = parsed.unit_shape(shape)
    return shape[0] % rows == 0 and shape[1] % columns == 0 and not (parsed.is_nm and shape[1] % parsed.group)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if ":" not in p])
@pytest.mark.parametrize("method", METHODS)
def test_each_layer_loses_the_rounded_share_of_its_units(pattern: str, method: str) -> None:
    n_tried = 0
    for shape in SHAPES:
        if not fits(pattern, shape):
            continue
        weights = {"layer": weight(shape)}
        n_units = parse_pattern(pattern).n_units(shape)
        for sparsity in SPARSITIES:
            mask = make_masks(weights, PruningSpec(sparsity, method=method, pattern=pattern), masks=kept(weights))[
                "layer"
            ]
            assert (mask.dtype, mask.shape) == (torch.bool, shape)
            n_zero = int((~mask).sum())
            assert n_zero * n_units == round(sparsity * n_units) * mask.numel(), (shape, sparsity)
            n_tried += 1
    assert n_tried >= 2 * len(SPARSITIES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_keeps_the_largest_and_of_equal_ones_the_first(dtype: torch.dtype) -> None:
    rounded = (weight((13, 17)) * 2).round().to(dtype)  # many ties
    order = np.argsort(-rounded.abs().double().numpy().reshape(-1), kind="stable")
    expected = torch.zeros(13 * 17, dtype=torch.bool)
    expected[torch.from_numpy(order[: 13 * 17 - round(0.6 * 13 * 17)])] = True
    weights = {"layer": rounded}
    assert torch.equal(make_masks(weights, PruningSpec(0.6), masks=kept(weights))["layer"], expected.reshape(13, 17))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("rows", [[0, 0, 0, 0], [1, 1, 1, 1]]),
        ("columns", [[1, 0, 0, 1], [1, 0, 0, 1]]),
        ("2x2", [[0, 0, 1, 1], [0, 0, 1, 1]]),
        ("1x2", [[0, 0, 0, 0], [1, 1, 1, 1]]),
        ("2:4", [[0, 1, 0, 1], [1, 0, 0, 1]]),
    ],
)
def test_patterns_by_hand(pattern: str, expected: list[list[int]]) -> None:
    weights = {"layer": torch.tensor([[1.0, -2.0, 0.0, 3.0], [7.0, 0.0, 5.0, -6.0]])}
    mask = make_masks(weights, PruningSpec(0.5, pattern=pattern), masks=kept(weights))["layer"]
    assert mask.int().tolist() == expected


def reference_global(weights: dict[str, Tensor], sparsity: float, pattern: str) -> dict[str, Tensor]:
    """Rank the units of all layers in one list with a stable sort."""
    parsed = parse_pattern(pattern)
    units = {name: unit_scores(w.abs(), parsed).double() for name, w in weights.items()}
    flat = np.concatenate([u.numpy().reshape(-1) for u in units.values()])
    keep = np.zeros(flat.size, dtype=bool)
    keep[np.argsort(-flat, kind="stable")[: flat.size - round(sparsity * flat.size)]] = True
    parts = torch.from_numpy(keep).split([u.numel() for u in units.values()])
    return {name: part.reshape(u.shape) for (name, u), part in zip(units.items(), parts, strict=True)}


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "2x2"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_global_ranks_all_layers_in_one_list(pattern: str, sparsity: float) -> None:
    weights = {name: (w * 2).round() for name, w in weights_of().items()}
    weights["b"] = weights["b"].to(torch.bfloat16)  # exact for these values, so a mix changes nothing
    weights["c"] = weights["c"].double()
    masks = make_masks(weights, PruningSpec(sparsity, pattern=pattern, allocation="global"), masks=kept(weights))
    expected = reference_global(weights, sparsity, pattern)
    for name, mask in masks.items():
        assert torch.equal(unit_any(mask, parse_pattern(pattern)), expected[name])


@pytest.mark.parametrize("allocation", ["global", "erk"])
@pytest.mark.parametrize("method", METHODS)
def test_the_layers_together_lose_the_rounded_share(allocation: str, method: str) -> None:
    weights = weights_of({"a": (5, 3), "b": (13, 17), "c": (1, 7)})
    total = sum(w.numel() for w in weights.values())
    for sparsity in SPARSITIES:
        masks = make_masks(weights, PruningSpec(sparsity, method=method, allocation=allocation), masks=kept(weights))
        assert sum(n_zeros(masks).values()) == round(sparsity * total)


@pytest.mark.parametrize("nm", ["1:2", "2:4", "1:4"])
def test_nm_has_its_own_sparsity(nm: str) -> None:
    keep, group = map(int, nm.split(":"))
    weights = weights_of()
    for sparsity in (None, 1 - keep / group):
        for mask in make_masks(weights, PruningSpec(sparsity, pattern=nm), masks=kept(weights)).values():
            assert mask.reshape(-1, group).sum(1).eq(keep).all()


def test_nm_prefers_what_is_kept_already() -> None:
    weights = {"layer": torch.tensor([[0.0, 0.0, 5.0, 0.0]])}
    masks = {"layer": torch.tensor([[False, False, True, True]])}
    assert make_masks(weights, PruningSpec(None, pattern="2:4"), masks=masks)["layer"].tolist() == [
        [False, False, True, True]
    ]


def test_a_dict_gives_each_layer_its_own_target() -> None:
    weights = weights_of()
    masks = make_masks(weights, PruningSpec(None, allocation={"a": 0.25, "re:[ab]": 0.5, "*": 1}), masks=kept(weights))
    assert n_zeros(masks) == {"a": 24, "b": 16, "c": 64}
    assert layer_targets({"a": 0.25, "re:[ab]": 0.5, "*": 1}, THREE) == {"a": 0.25, "b": 0.5, "c": 1.0}


CHOICES = st.sampled_from(
    [(p, a) for p in ("unstructured", "4x1", "2x2") for a in ALLOCATIONS]
    + [("rows", "uniform"), ("columns", "uniform")]
)


@repeatable
@given(CHOICES, st.sampled_from(sorted(METHODS)), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_targets_nest(choice: tuple[str, str], method: str, one: float, other: float, tied: bool) -> None:
    pattern, allocation = choice
    low, high = sorted((one, other))
    weights = {name: w.round() if tied else w for name, w in weights_of().items()}

    def move(sparsity: float, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        now = {name: w * masks[name] for name, w in weights.items()}  # as in a layer, masked weights are zero
        return make_masks(
            now, PruningSpec(sparsity, method=method, pattern=pattern, allocation=allocation), masks=masks
        )

    at_low = move(low, kept(weights))
    at_high = move(high, at_low)
    back = move(low, at_high)
    for name in weights:
        assert not bool((at_high[name] & ~at_low[name]).any())  # a higher target only removes
        assert not bool((at_high[name] & ~back[name]).any())  # a lower one only gives back
    assert sum(n_zeros(back).values()) == sum(n_zeros(at_low).values())
    again = move(high, at_high)
    assert all(torch.equal(again[name], at_high[name]) for name in weights)  # the same target changes nothing


def test_training_between_two_targets_does_not_revive_what_is_masked() -> None:
    first = torch.tensor([[True, False, True, False]])
    moved = {"layer": torch.tensor([[1.0, 9.0, 2.0, 9.0]])}  # an optimizer moved the masked weights
    assert make_masks(moved, PruningSpec(0.75), masks={"layer": first})["layer"].tolist() == [
        [False, False, True, False]
    ]


def test_a_lower_target_keeps_what_is_kept_whatever_the_scores() -> None:
    weights, masks = (
        {"layer": torch.tensor([[1.0, 2.0, 0.0, 0.0]])},
        {"layer": torch.tensor([[True, True, False, False]])},
    )
    for allocation in ("uniform", "global"):
        mask = make_masks(weights, PruningSpec(0.25, method=torch.neg, allocation=allocation), masks=masks)["layer"]
        assert mask.tolist() == [[True, True, True, False]]


def test_random_masks_come_from_the_seed_and_the_name() -> None:
    weights = {"a": weight((64, 64)), "b": weight((64, 64))}

    def masks(seed: int | None) -> dict[str, Tensor]:
        return make_masks(weights, PruningSpec(0.5, method="random", seed=seed), masks=kept(weights))

    assert torch.equal(masks(3)["a"], masks(3)["a"])
    assert not torch.equal(masks(3)["a"], masks(4)["a"])
    assert not torch.equal(masks(3)["a"], masks(3)["b"])
    with torch.random.fork_rng():
        torch.manual_seed(99)
        state = torch.get_rng_state()
        assert torch.equal(masks(None)["a"], masks(None)["a"])
        assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move
    coarse = {name: w.bfloat16() for name, w in weights.items()}
    in_bf16 = make_masks(coarse, PruningSpec(0.5, method="random", seed=3), masks=kept(coarse))
    assert torch.equal(in_bf16["a"], masks(3)["a"])


@pytest.mark.parametrize("method", [lambda w: -w.abs(), torch.neg, torch.square], ids=["lambda", "neg", "square"])
def test_a_method_can_be_your_own_function(method: Callable[[Tensor], Tensor]) -> None:
    weights = {"layer": torch.tensor([[1.0, 4.0, 3.0, 2.0]])}
    smallest = method is not torch.square
    expected = [[True, False, False, True]] if smallest else [[False, True, True, False]]
    assert make_masks(weights, PruningSpec(0.5, method=method), masks=kept(weights))["layer"].tolist() == expected


def test_your_own_function_may_draw_random_numbers() -> None:
    seen = []

    def mine(weight: Tensor, *, seed: int) -> Tensor:
        seen.append(seed)
        return weight

    weights = weights_of()
    make_masks(weights, PruningSpec(0.5, method=mine, seed=1), masks=kept(weights))
    assert len(set(seen)) == len(weights)


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.1}, "sparsity must be a fraction between 0 and 1, got 1.1"),
        ({"sparsity": -0.1}, "sparsity must be a fraction between 0 and 1, got -0.1"),
        ({"sparsity": NAN}, "sparsity must be a fraction between 0 and 1, got nan"),
        ({"sparsity": None}, "a sparsity is needed"),
        ({"sparsity": 0.5, "method": "magnitud"}, "method 'magnitud' is none of: magnitude, random"),
        ({"sparsity": 0.5, "pattern": "2;4"}, "pattern '2;4' is none of"),
        ({"sparsity": 0.5, "allocation": "globl"}, "allocation 'globl' is none of: uniform, global, erk"),
        ({"sparsity": 0.5, "allocation": {"*": 0.5}}, "sparsity=0.5 has no effect beside an allocation"),
        ({"sparsity": None, "allocation": {"a": 0.5}}, r"says nothing for 'b' \(2 layers\); add '\*'"),
        ({"sparsity": None, "allocation": {"x": 0.5, "*": 0}}, "'x' matches no layer; near names"),
        ({"sparsity": None, "allocation": {"*": 50}}, r"the sparsity of '\*' must be a fraction .* got 50"),
        ({"sparsity": 0.9, "pattern": "2:4"}, "pattern 2:4 means sparsity 0.5, got 0.9; leave the sparsity out"),
        ({"sparsity": None, "pattern": "2:4", "allocation": "erk"}, "allocation 'erk' has no effect with pattern 2:4"),
        ({"sparsity": None, "pattern": "1:3"}, r"b: pattern 1:3 needs in_features divisible by 3, got 8; .*exclude="),
        ({"sparsity": 0.5, "pattern": "8x1"}, r"b: pattern 8x1 needs .* divisible by \(8, 1\), got \(4, 8\)"),
        ({"sparsity": 0.5, "pattern": "rows", "allocation": "global"}, "a unit has 4 weights in c and 12 in a"),
        ({"sparsity": 0.5, "pattern": "columns", "allocation": "erk"}, "needs units of one size"),
        ({"sparsity": 0.5, "seed": 3}, "seed=3 has no effect with method 'magnitude'"),
        ({"sparsity": 0.5, "method": lambda w: w.abs() * NAN}, "a: method '<lambda>' returned a score that is NaN"),
        ({"sparsity": 0.5, "method": lambda w: w[0]}, r"must return floating scores of shape \(8, 12\), got .*\(12,\)"),
        ({"sparsity": 0.5, "method": lambda w: w > 0}, "must return floating scores of shape .*, got torch.bool"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict, message: str) -> None:
    weights = weights_of()
    masks = kept(weights)
    before = {name: w.clone() for name, w in weights.items()}
    with pytest.raises(ValueError, match=message):
        make_masks(weights, PruningSpec(**options), masks=masks)
    assert all(torch.equal(weights[name], before[name]) and bool(masks[name].all()) for name in weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    weights = weights_of()
    weights["b"][1, 2] = bad
    with pytest.raises(ValueError, match=r"^b: the weight holds NaN or Inf; .*exclude=\['b'\]"):
        make_masks(weights, PruningSpec(0.5), masks=kept(weights))
    masks = kept(weights)
    masks["b"][1, 2] = False  # gone already
    assert sum(n_zeros(make_masks(weights, PruningSpec(0.5), masks=masks)).values()) == 48 + 16 + 32


def test_a_weight_without_data_is_refused_by_name() -> None:
    weights = {"fc": torch.empty(4, 4, device="meta")}
    with pytest.raises(ValueError, match="fc: the weight is on the meta device and has no data"):
        make_masks(weights, PruningSpec(0.5), masks=kept(weights))


def test_nothing_given_is_changed() -> None:
    weights = weights_of()
    masks = kept(weights)
    before = {name: w.clone() for name, w in weights.items()}
    result = make_masks(weights, PruningSpec(0.5), masks=masks)
    assert all(torch.equal(weights[name], before[name]) and bool(masks[name].all()) for name in weights)
    assert all(result[name] is not masks[name] for name in weights)
    same = make_masks(weights, PruningSpec(0.0), masks=masks)
    assert all(same[name].data_ptr() != masks[name].data_ptr() for name in weights)

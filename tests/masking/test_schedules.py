"""The target is a pure function of time, and ends at exactly the final sparsity."""

import dataclasses
import itertools
import math
from typing import get_args

import pytest
from cases import repeatable
from hypothesis import given
from hypothesis import strategies as st

from sparsify.masking.schedules import Kind, Schedule

GRADUAL = ("linear", "polynomial", "exponential", "cosine")
SPAN = {"start": 2.0, "end": 12.0, "every": 3.0}
POINTS = ((1.0, 0.2), (4.0, 0.5), (9.0, 0.9))


def test_every_kind_is_tested_here() -> None:
    assert {*GRADUAL, "constant", "one-shot", "steps", "alternating"} == set(get_args(Kind))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # from 0.1 at time 2 to 0.9 at time 12, so half-way at 7
        ("linear", {1.99: 0.0, 2: 0.1, 7: 0.5, 12: 0.9, 99: 0.9}),
        ("polynomial", {1.99: 0.0, 2: 0.1, 7: 0.9 - 0.8 / 8, 12: 0.9, 99: 0.9}),
        ("exponential", {1.99: 0.0, 2: 0.1, 7: 1 - math.sqrt(0.9 * 0.1), 12: 0.9, 99: 0.9}),
        ("cosine", {1.99: 0.0, 2: 0.1, 7: 0.5, 4.5: 0.1 + 0.4 * (1 - math.sqrt(0.5)), 12: 0.9, 99: 0.9}),
    ],
)
def test_gradual_schedules(kind: Kind, expected: dict[float, float]) -> None:
    schedule = Schedule(kind=kind, initial=0.1, **SPAN)
    assert {time: schedule.sparsity_at(time, 0.9) for time in expected} == pytest.approx(expected, abs=1e-12)
    assert schedule.sparsity_at(12, 0.9) == 0.9  # exactly
    assert schedule.update_times() == (2.0, 5.0, 8.0, 11.0, 12.0)
    assert schedule.ends == 12.0


def test_constant_and_one_shot() -> None:
    assert [Schedule().sparsity_at(time, 0.7) for time in (0, 5)] == [0.7, 0.7]
    assert Schedule().update_times() == (0.0,)
    once = Schedule(kind="one-shot", start=3)
    assert [once.sparsity_at(time, 0.7) for time in (0, 2.999, 3, 4)] == [0.0, 0.0, 0.7, 0.7]
    assert once.update_times() == (3.0,)


def test_steps_hold_until_the_next_point() -> None:
    schedule = Schedule(kind="steps", points=POINTS)
    assert [schedule.sparsity_at(time, 0.9) for time in (0, 1, 3.9, 4, 9, 50)] == [0.0, 0.2, 0.2, 0.5, 0.9, 0.9]
    assert schedule.update_times() == (1.0, 4.0, 9.0)


def test_rounding_of_times_adds_no_update() -> None:
    assert 2.1 / 0.7 > 3
    assert len(Schedule(kind="linear", end=2.1, every=0.7).update_times()) == 4


def test_the_power_bends_the_polynomial() -> None:
    flat = Schedule(kind="polynomial", power=1, **SPAN)
    assert flat.sparsity_at(7, 0.8) == pytest.approx(0.4)
    assert Schedule(kind="polynomial", power=2, **SPAN).sparsity_at(7, 0.8) == pytest.approx(0.6)


@repeatable
@given(
    st.sampled_from(GRADUAL),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.floats(0, 1e4),
    st.floats(0.01, 1e4),
    st.integers(1, 50),
)
def test_a_gradual_schedule_only_rises_and_ends_exactly(
    kind: Kind, a: float, b: float, start: float, length: float, n_updates: int
) -> None:
    initial, final = sorted((a, b))
    end = start + length
    schedule = Schedule(kind=kind, start=start, end=end, every=(end - start) / n_updates, initial=initial)
    times = schedule.update_times()
    targets = [schedule.sparsity_at(time, final) for time in times]
    assert len(times) == n_updates + 1
    assert list(times) == sorted(set(times))
    assert (times[0], times[-1]) == (start, end)
    assert targets[0] == pytest.approx(initial)
    assert targets[-1] == final
    assert all(0 <= x <= 1 for x in targets)
    assert all(x <= y + 1e-12 for x, y in itertools.pairwise(targets))


def test_the_target_does_not_depend_on_what_was_asked_before() -> None:
    schedule = Schedule(kind="polynomial", **SPAN)
    before = schedule.sparsity_at(5, 0.9)
    schedule.sparsity_at(12, 0.1)
    assert schedule.sparsity_at(5, 0.9) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.start = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["linear", "polynomial", "cosine"])
def test_full_sparsity_can_be_reached(kind: Kind) -> None:
    schedule = Schedule(kind=kind, **SPAN)
    assert all(0 <= schedule.sparsity_at(time, 1.0) <= 1 for time in schedule.update_times())
    assert schedule.sparsity_at(12, 1.0) == 1.0


def test_no_factor_leads_to_full_sparsity() -> None:
    with pytest.raises(ValueError, match="cannot reach sparsity 1; use 'polynomial' or 'cosine'"):
        Schedule(kind="exponential", **SPAN).sparsity_at(5, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cubic"}, "schedule kind 'cubic' is none of: constant, one-shot, linear"),
        ({"unit": "days"}, "unit 'days' is none of: steps, epochs"),
        ({"kind": "constant", "start": 5}, "'start' has no effect with kind 'constant'"),
        ({"kind": "one-shot", "every": 1}, "'every' has no effect with kind 'one-shot'"),
        ({"kind": "linear", "power": 2, **SPAN}, "'power' has no effect with kind 'linear'"),
        ({"kind": "linear", "points": POINTS, **SPAN}, "'points' has no effect with kind 'linear'"),
        ({"kind": "steps", "points": POINTS, "start": 1}, "'start' has no effect with kind 'steps'"),
        ({"kind": "one-shot", "start": -1}, "'start' must be a time of at least 0, got -1"),
        ({"kind": "one-shot", "start": math.nan}, "'start' must be a time"),
        ({"kind": "linear", "every": 1}, r"needs an 'end' after its start \(0.0\), got None"),
        ({"kind": "linear", "start": 5, "end": 5, "every": 1}, r"needs an 'end' after its start \(5\), got 5"),
        ({"kind": "linear", "end": math.inf, "every": 1}, "needs an 'end'"),
        ({"kind": "linear", "end": 5}, "needs 'every', the time between updates, got None"),
        ({"kind": "linear", "end": 5, "every": 0}, "needs 'every'"),
        ({"kind": "linear", "end": 5, "every": 1e-9}, "over a million updates"),
        ({"kind": "linear", "initial": 1.5, "end": 5, "every": 1}, "'initial' must be a fraction between 0 and 1"),
        ({"kind": "polynomial", "power": 0, **SPAN}, "'power' must be above 0, got 0"),
        ({"kind": "steps"}, "needs 'points' of"),
        ({"kind": "steps", "points": ((2.0, 0.1), (1.0, 0.2))}, "in order of time"),
        ({"kind": "steps", "points": ((1.0, 0.1), (1.0, 0.2))}, "in order of time"),
        ({"kind": "steps", "points": ((math.nan, 0.1),)}, "in order of time"),
        ({"kind": "steps", "points": ((0.0, 0.1), (math.nan, 0.2), (5.0, 0.3))}, "in order of time"),
        ({"kind": "steps", "points": ((1.0, 1.1),)}, "the point at 1.0 must be a fraction"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


def test_alternating_is_sparse_and_dense_in_turns_and_ends_sparse() -> None:
    schedule = Schedule(kind="alternating", start=2, every=2, end=9)
    assert schedule.update_times() == (2, 4, 6, 8, 9)
    assert [schedule.sparsity_at(t, 0.9) for t in (0, 2, 3.5, 4, 5.5, 6, 8, 9, 50)] == [
        *(0.0, 0.9, 0.9, 0.0, 0.0, 0.9, 0.0, 0.9, 0.9),
    ]


def test_a_constant_schedule_may_have_update_times() -> None:
    schedule = Schedule(kind="constant", every=2, end=5)
    assert schedule.update_times() == (0, 2, 4, 5)
    assert {schedule.sparsity_at(t, 0.9) for t in (0, 1, 5, 9)} == {0.9}
    with pytest.raises(ValueError, match="needs 'every'"):
        Schedule(kind="constant", end=5)

"""Calls timed in turns: how often each is called, whatever the clock says."""

import itertools

import pytest

from sparsify.hardware import timing
from sparsify.hardware.timing import measure, measure_cold


@pytest.mark.parametrize(("hopeless", "n_slow"), [(3.0, 2), (30.0, 7)])
def test_a_hopeless_candidate_is_left_at_two_samples(monkeypatch, hopeless, n_slow):
    """The better sample decides: a fast candidate that was disturbed once stays."""
    disturbed = itertools.chain([9.0], itertools.repeat(1.0))
    times = {"fast": itertools.repeat(1.0), "disturbed": disturbed, "slow": itertools.repeat(3.5)}
    monkeypatch.setattr(timing, "_sample", lambda rotation, sample_s, wait: next(times[next(rotation)()]))
    candidates = {name: [lambda name=name: name] for name in times}
    timings = measure(candidates, rounds=7, hopeless=hopeless)
    assert {name: t.n for name, t in timings.items()} == {"fast": 7, "disturbed": 7, "slow": n_slow}
    assert timings["slow"].median_s == 3.5


def test_a_cold_call_is_a_sample_after_one_untimed():
    calls = []
    timings = measure_cold({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 1 << 12, rounds=5)
    assert sorted(calls) == ["a"] * 6 + ["b"] * 6
    assert {name: t.n for name, t in timings.items()} == {"a": 5, "b": 5}

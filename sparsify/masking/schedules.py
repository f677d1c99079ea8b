"""Schedules: the target sparsity as a pure function of training time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args

from sparsify.masking.allocation import check_sparsity

Kind = Literal["constant", "one-shot", "linear", "polynomial", "exponential", "cosine", "steps", "alternating"]
Unit = Literal["steps", "epochs"]

#: The options of each kind besides `kind` and `unit`.
_USES: dict[str, frozenset[str]] = {
    "constant": frozenset({"end", "every"}),
    "one-shot": frozenset({"start"}),
    "linear": frozenset({"start", "end", "every", "initial"}),
    "polynomial": frozenset({"start", "end", "every", "initial", "power"}),
    "exponential": frozenset({"start", "end", "every", "initial"}),
    "cosine": frozenset({"start", "end", "every", "initial"}),
    "steps": frozenset({"points"}),
    "alternating": frozenset({"start", "end", "every"}),
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A target over time. Times are in `unit`s; a fraction of an epoch is a time like any other.

    constant: the final sparsity from the beginning; with `end` and `every`, weights may change places until then.
    one-shot: nothing, and from `start` on the final sparsity.
    linear, polynomial, exponential, cosine: from `initial` at `start` to the final sparsity at `end`, moving `every` so
    often; before `start` nothing is pruned.
    steps: `points` of (time, sparsity), each holding until the next.
    alternating: the final sparsity and none in turns, each for `every`, from `start`; from `end` on the final one.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # in a recipe, an unknown key is an error

    kind: Kind = "constant"
    unit: Unit = "steps"
    start: float = 0.0
    end: float | None = None
    every: float | None = None
    initial: float = 0.0
    power: float = 3.0
    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"schedule kind {self.kind!r} is none of: {', '.join(get_args(Kind))}")
        if self.unit not in get_args(Unit):
            raise ValueError(f"schedule unit {self.unit!r} is none of: {', '.join(get_args(Unit))}")
        for field in fields(self):
            is_set = getattr(self, field.name) != field.default
            if is_set and field.name not in _USES[self.kind] | {"kind", "unit"}:
                raise ValueError(f"{field.name!r} has no effect with kind {self.kind!r}; take it out")
        if not (math.isfinite(self.start) and self.start >= 0):
            raise ValueError(f"'start' must be a time of at least 0, got {self.start}")
        if "end" in _USES[self.kind] and (self.kind != "constant" or self.end is not None or self.every is not None):
            if self.end is None or not (math.isfinite(self.end) and self.end > self.start):
                raise ValueError(f"kind {self.kind!r} needs an 'end' after its start ({self.start}), got {self.end}")
            if self.every is None or not (math.isfinite(self.every) and self.every > 0):
                raise ValueError(f"kind {self.kind!r} needs 'every', the time between updates, got {self.every}")
            if (self.end - self.start) / self.every > 1e6:
                raise ValueError(f"'every' = {self.every} means over a million updates until {self.end}")
            check_sparsity(self.initial, "'initial'")
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"'power' must be above 0, got {self.power}")
        if self.kind == "steps":
            times = [time for time, _ in self.points]
            if not times or times != sorted(set(times)) or times[0] < 0 or not all(map(math.isfinite, times)):
                raise ValueError(f"kind 'steps' needs 'points' of (time, sparsity) in order of time, got {self.points}")
            for time, sparsity in self.points:
                check_sparsity(sparsity, f"the point at {time}")

    @property
    def ends(self) -> float:
        """The time of the final target, the last update."""
        return self.update_times()[-1]

    def check_finals(self, finals: Sequence[float]) -> None:
        """Raise ValueError if the schedule does not end at, or cannot come to, each of these final sparsities."""
        if self.kind == "steps" and any(final != self.points[-1][1] for final in finals):
            raise ValueError(f"the last of the schedule's points must be the target {finals}, got {self.points[-1][1]}")
        if self.initial > min(finals, default=1.0):
            raise ValueError(f"the schedule's initial {self.initial} lies above the target {min(finals)}")
        if self.kind == "exponential":
            for final in finals:
                _check_factor(self.initial, final)

    def update_times(self) -> tuple[float, ...]:
        """Return, in order, the times of all changes of the target. The last one reaches the final sparsity.

        >>> Schedule(kind="linear", start=2, end=5, every=2).update_times()
        (2.0, 4.0, 5.0)
        """
        if self.kind == "constant" and self.end is None:
            return (0.0,)
        if self.kind == "one-shot":
            return (float(self.start),)
        if self.kind == "steps":
            return tuple(float(time) for time, _ in self.points)
        assert self.end is not None
        assert self.every is not None
        n = math.ceil((self.end - self.start) / self.every - 1e-9)
        return (*(float(self.start + i * self.every) for i in range(n)), float(self.end))

    def sparsity_at(self, time: float, final: float) -> float:
        """Return the target at `time`, for a final sparsity. It never depends on anything else.

        >>> cubic = Schedule(kind="polynomial", start=0, end=10, every=1)
        >>> [round(cubic.sparsity_at(t, final=0.9), 4) for t in (0, 5, 10, 99)]
        [0.0, 0.7875, 0.9, 0.9]

        Zhu and Gupta 2017, arXiv:1710.01878 (the polynomial); Peste et al. 2021, arXiv:2106.12379 (alternating).
        """
        if self.kind == "constant":
            return final
        if self.kind == "steps":
            return max(((t, s) for t, s in self.points if t <= time), default=(0.0, 0.0))[1]
        if time < self.start:
            return 0.0
        if self.kind == "one-shot" or self.end is None or time >= self.end:
            return final
        if self.kind == "alternating":
            assert self.every is not None
            return 0.0 if math.floor((time - self.start) / self.every + 1e-9) % 2 else final
        way = _CURVES[self.kind]((time - self.start) / (self.end - self.start), self.initial, final, self.power)
        return self.initial + (final - self.initial) * way


def _check_factor(initial: float, final: float) -> None:
    """Raise ValueError if no factor leads from the initial density to the final one."""
    if final >= 1 or initial >= 1:
        raise ValueError("an exponential schedule cannot reach sparsity 1; use 'polynomial' or 'cosine'")


def _exponential(x: float, initial: float, final: float, power: float) -> float:
    """Let the density fall by the same factor in equal times."""
    _check_factor(initial, final)
    if final == initial:
        return 1.0
    density = (1 - initial) * ((1 - final) / (1 - initial)) ** x
    way: float = (1 - density - initial) / (final - initial)
    return way


#: Fraction of the way from initial to final, at a fraction x of the time.
_CURVES: dict[str, Callable[[float, float, float, float], float]] = {
    "linear": lambda x, initial, final, power: x,
    "polynomial": lambda x, initial, final, power: 1 - (1 - x) ** power,
    "exponential": _exponential,
    "cosine": lambda x, initial, final, power: (1 - math.cos(math.pi * x)) / 2,
}

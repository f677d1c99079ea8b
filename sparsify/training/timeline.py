"""The times of a recipe as optimizer steps of one training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from sparsify.masking.schedules import Schedule
from sparsify.recipes.schema import Recipe


def update_steps(
    number: int, schedule: Schedule, steps_per_epoch: int | None, total_steps: int | None
) -> dict[int, float]:
    """Map the step of each update to the time, in the schedule's unit, of its target.

    Raises ValueError, naming the group by its number, if the schedule cannot be followed to its end.
    """
    if schedule.unit == "epochs" and steps_per_epoch is None:
        raise ValueError(f"groups.{number}: the schedule is in epochs; give steps_per_epoch")
    updates = {_step_of(time, schedule, steps_per_epoch): time for time in schedule.update_times()}
    if total_steps is not None and max(updates) > total_steps:
        raise ValueError(
            f"groups.{number}: the schedule ends at step {max(updates)}, after the training's last, {total_steps}; "
            "the target would be missed"
        )
    return updates


def falling_steps(schedule: Schedule, updates: Mapping[int, float]) -> set[int]:
    """Return the steps of lower targets than before: there the schedule itself gives weights back."""
    if schedule.kind not in ("steps", "alternating"):
        return set()
    targets = [(step, schedule.sparsity_at(time, 1.0)) for step, time in sorted(updates.items())]
    return {step for (_, before), (step, target) in itertools.pairwise(targets) if target < before}


def last_time(updates: Mapping[int, float], step: int) -> float | None:
    """Return the time of the last update up to a step; None before the first."""
    passed = [update for update in updates if update <= step]
    return updates[max(passed)] if passed else None


def rewind_step(recipe: Recipe, steps_per_epoch: int | None) -> int | None:
    """Return the step that the recipe goes back to; None without rewinding."""
    steps = {
        _step_of(group.rewind, group.schedule, steps_per_epoch) for group in recipe.groups if group.rewind is not None
    }
    if len(steps) > 1:
        raise ValueError(f"all groups must rewind to one time, as the whole model goes back; got steps {sorted(steps)}")
    return steps.pop() if steps else None


def _step_of(time: float, schedule: Schedule, steps_per_epoch: int | None) -> int:
    """Return the first step at or after a time."""
    return math.ceil(time * ((steps_per_epoch or 1) if schedule.unit == "epochs" else 1) - 1e-6)

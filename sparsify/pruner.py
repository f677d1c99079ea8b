"""A recipe followed inside a training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.convert import sparse_layers
from sparsify.layers import Masked
from sparsify.recipe import Recipe, assign_layers, group_masks


class Pruner:
    """Follow a recipe's schedules: call `step()` after each `optimizer.step()`.

    Masks move when a schedule says so; in between, and whatever the optimizer does, masked weights are exactly zero.
    With the `optimizer` given, its state of newly masked weights (momentum, Adam's moments) is cleared too, so that
    they do not push on what is gone. `steps_per_epoch` is needed by schedules in epochs, `total_steps` lets a schedule
    that would not end in time fail now rather than miss its target.

    >>> model = sparsify.convert(nn.Sequential(nn.Linear(8, 4)))
    >>> recipe = sparsify.Recipe(groups=[{"sparsity": 0.5, "schedule": {"kind": "linear", "end": 2, "every": 1}}])
    >>> pruner = Pruner(model, recipe)
    >>> for _ in range(2):
    ...     pruner.step()
    ...     print(pruner.sparsity)
    0.25
    0.5
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.model, self.recipe, self.optimizer = model, recipe, optimizer
        self.n_steps = 0
        names = assign_layers(recipe, model)
        layers = sparse_layers(model)
        if missing := [name for group in names for name in group if name not in layers]:
            raise ValueError(f"{missing[0]}: not converted; call sparsify.convert(model) first")
        self.groups = [list(group) for group in names]
        self.layers = {name: layers[name] for group in self.groups for name in group}
        self.updates = [
            _update_steps(number, group.schedule, steps_per_epoch, total_steps)
            for number, group in enumerate(recipe.groups)
        ]
        self._update()

    @property
    def sparsity(self) -> float:
        """The fraction of zeros over all layers of the recipe."""
        total = sum(layer.mask.numel() for layer in self.layers.values())
        return sum(int((~layer.mask).sum()) for layer in self.layers.values()) / max(total, 1)

    def step(self) -> None:
        """Say that one optimizer step is done: move the masks if it is time, and keep masked weights at zero."""
        self.n_steps += 1
        self._update()
        for layer in self.layers.values():
            layer.zero_masked()

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later; the masks are in the model's own state_dict."""
        return {"version": 1, "n_steps": self.n_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; load the model's state_dict as well."""
        if state.get("version") != 1 or not isinstance(state.get("n_steps"), int):
            raise ValueError(f"not a Pruner's state: {dict(state)!r}")
        self.n_steps = state["n_steps"]

    def _update(self) -> None:
        """Move the masks of the groups whose time has come."""
        for group, names, updates in zip(self.recipe.groups, self.groups, self.updates, strict=True):
            if self.n_steps in updates:
                for name, mask in group_masks(self.model, group, names, updates[self.n_steps]).items():
                    self.layers[name].set_mask(mask)
                    self._forget_masked(self.layers[name])

    @torch.no_grad()
    def _forget_masked(self, layer: Masked) -> None:
        """Clear gradient and optimizer state of masked weights, so that nothing moves them again."""
        state = self.optimizer.state.get(layer.weight, {}) if self.optimizer else {}
        for tensor in (layer.weight.grad, *state.values()):
            if isinstance(tensor, Tensor) and tensor.shape == layer.mask.shape:
                layer.clear_masked(tensor)


def _update_steps(number: int, schedule: Any, steps_per_epoch: int | None, total_steps: int | None) -> dict[int, float]:
    """Map each step after which the masks move to the time, in the schedule's unit, whose target they get."""
    if schedule.unit == "epochs" and steps_per_epoch is None:
        raise ValueError(f"groups.{number}: the schedule is in epochs; give steps_per_epoch")
    scale = (steps_per_epoch or 1) if schedule.unit == "epochs" else 1
    updates = {math.ceil(time * scale - 1e-6): time for time in schedule.update_times()}
    if total_steps is not None and max(updates) > total_steps:
        raise ValueError(
            f"groups.{number}: the schedule ends at step {max(updates)}, after the training's last, {total_steps}; "
            "the target would be missed"
        )
    return updates

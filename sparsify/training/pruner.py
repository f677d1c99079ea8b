"""A recipe followed inside a training loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sparsify.conversion.convert import sparse_layers
from sparsify.distributed import ALONE, ranks_of
from sparsify.errors import ScheduleWarning
from sparsify.layers import Masked
from sparsify.layers.fsdp import cut_by_rows, own_rows, shard_like
from sparsify.layers.sparse_training import Choice, SparseSteps
from sparsify.masking.methods.registry import mix_seed, needs, score
from sparsify.masking.patterns import parse_pattern
from sparsify.masking.regrowth import exchange, fraction_at, random_growth
from sparsify.masking.schedules import Schedule
from sparsify.recipes.recipe import HOLD, Group, Recipe, assign_layers, group_masks
from sparsify.training.gradient_statistics import Evidence, from_loss, watch
from sparsify.training.optimizer_state import forget, learning_rate
from sparsify.training.rewinding import copy_state, restore_state


class Pruner:
    """Follow a recipe's schedules: call `step()` after each `optimizer.step()`.

    Masks move when a schedule says so; in between, and whatever the optimizer does, masked weights are exactly zero
    (or out of sight, where a group has them `frozen` or `trained`, until its schedule ends). With the `optimizer`
    given, what it remembers of weights that go or come back (momentum, Adam's moments) is cleared.

    `steps_per_epoch` is needed by schedules in epochs; say `end_epoch()` after each epoch to have it checked.
    `total_steps` lets a schedule that would not end in time fail now rather than miss its target. `loss`, a function
    without arguments that returns the loss of some batch, is for methods that look at gradients at one moment (snip,
    grasp). `scaler` is the GradScaler, if there is one. `state` is a saved `state_dict()` to go on from: like
    `load_state_dict`, but the model may have been loaded before.

    `sparse_backward` lets training steps on the CPU touch kept weights only, forward and back: "auto" where a
    measurement at the first step after a mask has changed finds that faster, "always" wherever it can be done. Results
    are the same up to the order of additions; as "auto" chooses by time, two runs may round differently.

    In a distributed training, every rank makes a Pruner, of the model in its DDP wrapper or after FSDP2's fully_shard:
    all get the same masks, from gradients averaged over ranks, and no rank sees another's weights.

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
        loss: Callable[[], Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        state: Mapping[str, Any] | None = None,
        sparse_backward: Choice = "never",
    ) -> None:
        self.ranks = ranks_of(model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        self.model, self.recipe, self.optimizer, self.loss, self.scaler = model, recipe, optimizer, loss, scaler
        self.steps_per_epoch, self.n_steps, self._epoch_began = steps_per_epoch, 0, 0
        if recipe.recover is not None:
            raise ValueError("'recover' follows one-shot pruning (sparsify.apply); in a training it has no effect")
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
        self._rewind_step = _rewind_step(recipe, steps_per_epoch)
        if optimizer is None and any(group.decay for group in recipe.groups):
            raise ValueError("'decay' of masked weights follows the learning rate; give the optimizer")
        if sparse_backward not in get_args(Choice):
            raise ValueError(f"sparse_backward {sparse_backward!r} is none of: {', '.join(get_args(Choice))}")
        for layer in self.layers.values():
            layer.steps = None if sparse_backward == "never" else SparseSteps(sparse_backward == "always")
        self._movement: dict[str, Tensor] = {}
        self._gradient: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._fingerprints: dict[str, int] = {}
        if state is not None:
            self.load_state_dict(state)
        else:
            self._update()
            self._look_ahead()

    @property
    def sparsity(self) -> float:
        """The fraction of masked weights over all layers of the recipe."""
        total = sum(layer.mask.numel() for layer in self.layers.values())
        return sum(int((~layer.mask).sum()) for layer in self.layers.values()) / max(total, 1)

    def metrics(self) -> dict[str, float]:
        """Return the sparsity, of all and of each layer, by names that loggers such as TensorBoard group."""
        return {"sparsity": self.sparsity} | {f"sparsity/{name}": layer.sparsity for name, layer in self.layers.items()}

    def step(self) -> None:
        """Say that one optimizer step is done: move the masks if it is time, and keep masked weights at zero."""
        self._check_masks()
        self.n_steps += 1
        self._gather()
        self._update()
        for group, names in zip(self.recipe.groups, self.groups, strict=True):
            for name in names:
                self.layers[name].zero_masked()
                if group.decay:
                    self._decay(self.layers[name], group.decay)
        self._look_ahead()

    def end_epoch(self) -> None:
        """Say that an epoch is over; a ScheduleWarning tells if it had another length than schedules in epochs assume.

        Of a run that goes on in the middle of an epoch, the first epoch counts from its beginning.
        """
        n_seen, self._epoch_began = self.n_steps - self._epoch_began, self.n_steps
        if self.steps_per_epoch not in (None, n_seen):
            ends = max(max(updates) for updates in self.updates)
            warnings.warn(
                f"this epoch had {n_seen} optimizer steps, but steps_per_epoch={self.steps_per_epoch}: the recipe "
                f"ends at step {ends}, which is epoch {ends / max(n_seen, 1):.4g} at this rate; make the Pruner with "
                f"steps_per_epoch={n_seen} (batches divided by gradient accumulation)",
                ScheduleWarning,
                stacklevel=2,
            )

    def finish(self) -> None:
        """Say that training is over. Raises RuntimeError if a schedule has not come to its end, naming its target."""
        for number, (group, updates) in enumerate(zip(self.recipe.groups, self.updates, strict=True)):
            if self.n_steps < max(updates):
                target = group.allocation if group.sparsity is None else group.sparsity
                raise RuntimeError(
                    f"groups.{number}: training ended at step {self.n_steps}, before the schedule did at step "
                    f"{max(updates)}; the target {target} was not reached, the sparsity is {self.sparsity:.4g}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later, between two steps; weights and masks are in the model's state_dict."""
        return {
            "version": 1,
            "n_steps": self.n_steps,
            "epoch_began": self._epoch_began,
            "movement": dict(self._movement),
            "gradient": dict(self._gradient),
            "start": dict(self._start),
            "masks": {name: fingerprint(layer.mask) for name, layer in self.layers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; load the model's and the optimizer's state_dict as well, after making the Pruner.

        Raises ValueError for a state of another kind; the next step raises one if the masks are not those of the state.
        """
        if state.get("version") != 1 or not isinstance(state.get("n_steps"), int) or "masks" not in state:
            raise ValueError(f"not a Pruner's state: {str(dict(state))[:200]}")
        if set(state["masks"]) != set(self.layers):
            other = sorted(set(state["masks"]) ^ set(self.layers))[0]
            raise ValueError(f"the state is of another recipe or model: {other!r} is in only one of both")
        self.n_steps, self._epoch_began = state["n_steps"], state["epoch_began"]
        self._movement, self._gradient = dict(state["movement"]), dict(state.get("gradient", {}))
        self._start = dict(state["start"])
        self._fingerprints = dict(state["masks"])
        self._look_ahead()

    def _check_masks(self) -> None:
        """Compare the masks with those that a state was saved with, once."""
        for name, expected in self._fingerprints.items():
            if fingerprint(self.layers[name].mask) != expected:
                raise ValueError(
                    f"{name}: its mask is not the one saved with the Pruner's state; load the model's state_dict after "
                    "making the Pruner, or give the state when making it: Pruner(..., state=...)"
                )
        self._fingerprints = {}

    def _update(self) -> None:
        """Move the masks of the groups whose time has come."""
        if self.n_steps == self._rewind_step:
            self._start = copy_state(self.model)
        rewind = False
        for group, names, updates in zip(self.recipe.groups, self.groups, self.updates, strict=True):
            if self.n_steps not in updates:
                continue
            for name in names:
                self.layers[name].masked_are = "zero" if self.n_steps == max(updates) else group.masked
            time = updates[self.n_steps]
            evidence = self._evidence(group, names)
            masks = group_masks(self.model, group, names, time, evidence, self.ranks)
            if group.regrow and self.n_steps > min(updates):
                masks = {name: self._exchanged(group, name, mask, updates) for name, mask in masks.items()}
            for name, mask in masks.items():
                self._set_mask(self.layers[name], mask)
            rewind |= group.rewind is not None
            self._check_ranks(names)
        if rewind:
            restore_state(self.model, self._start, self.optimizer)
            for layer in self.layers.values():
                layer.zero_masked()

    def _exchanged(self, group: Group, name: str, mask: Tensor, updates: Mapping[int, float]) -> Tensor:
        """Let the weakest weights of a mask give their places to others; without a gradient to go by, to none."""
        assert group.regrow is not None
        layer, (first, last) = self.layers[name], (min(updates), max(updates))
        if group.regrow.by == "random":
            growth = random_growth(mask, mix_seed(group.seed or 0, f"{name} at {self.n_steps}"))
        else:
            if name not in self._gradient:
                return mask
            growth = layer.matrix(self._gradient.pop(name)).abs()
        fraction = fraction_at(group.regrow.fraction, (self.n_steps - first) / (last - first))
        pattern = parse_pattern(group.pattern)
        ranks = self.ranks if cut_by_rows(layer, pattern, self.ranks) else ALONE
        scores = score(name, own_rows(layer, ranks), group.method)
        rows = exchange(ranks.rows(mask), scores, ranks.rows(growth), fraction, pattern, ranks)
        return ranks.join(rows, mask.shape[0])

    def _check_ranks(self, names: list[str]) -> None:
        """Raise RuntimeError if processes that train one model have come to different masks."""
        if self.ranks.n > 1:
            marks = self.ranks.gather(torch.tensor([fingerprint(self.layers[name].mask) for name in names]))
            for name, differs in zip(names, (marks != marks[0]).any(0).tolist(), strict=True):
                if differs:
                    raise RuntimeError(
                        f"{name}: the ranks have different masks, so their weights or gradients differ; give the "
                        "Pruner the model in its DDP wrapper, or after fully_shard"
                    )

    def _set_mask(self, layer: Masked, mask: Tensor) -> None:
        """Use a mask, and clear gradient and optimizer state of what goes and of what comes back."""
        before = layer.mask
        layer.set_mask(mask)
        if layer.masked_are != "trained":
            forget(self.optimizer, layer.weight, (before != layer.mask) | ~layer.mask)

    @torch.no_grad()
    def _decay(self, layer: Masked, decay: float) -> None:
        """Shrink masked weights that are trained, as weight decay would (SR-STE)."""
        if layer.masked_are == "trained":
            assert self.optimizer is not None
            factor = 1 - decay * learning_rate(self.optimizer, layer.weight)
            layer.weight.copy_(torch.where(shard_like(layer.mask, layer.weight), layer.weight, layer.weight * factor))

    def _evidence(self, group: Group, names: list[str]) -> Evidence:
        """Return what the group's method asks for, as far as it is known, as matrices (out, in)."""
        asked = needs(group.method) if group.method != HOLD else set()
        layers = {name: self.layers[name] for name in names}
        if asked and self.loss is not None:
            found = from_loss(layers, self.loss, curvature="curvature" in asked, ranks=self.ranks)
        else:
            found = {name: {"movement": self._movement[name]} for name in names if name in self._movement}
        return {name: {key: layers[name].matrix(value) for key, value in of.items()} for name, of in found.items()}

    def _gather(self) -> None:
        """Take over what the backward passes of this step added up."""
        for name, layer in self.layers.items():
            if layer.watch is not None:
                self._add(self._movement, name, layer.watch.movement)
                self._add(self._gradient, name, layer.watch.gradient)

    def _add(self, sums: dict[str, Tensor], name: str, seen: Tensor | None) -> None:
        """Add the mean over ranks of what one step showed; nothing where it overflowed, and AMP skipped the step."""
        seen = None if seen is None else self.ranks.mean(seen)
        if seen is not None and bool(torch.isfinite(seen).all()):
            sums[name] = sums.get(name, 0) + seen / self._scale

    def _look_ahead(self) -> None:
        """Ask the layers for what the next step has to show."""
        self._scale = self.scaler.get_scale() if self.scaler else 1.0
        for group, names, updates in zip(self.recipe.groups, self.groups, self.updates, strict=True):
            last = max(updates)
            gradient = bool(
                group.regrow
                and group.regrow.by == "gradient"
                and any(self.n_steps + ahead in updates for ahead in range(1, group.regrow.steps + 1))
            )
            moves = group.method != HOLD and "movement" in needs(group.method)
            for name in names:
                layer = self.layers[name]
                layer.masked_are = group.masked if min(updates) <= self.n_steps < last else "zero"
                watch(layer, gradient=gradient, movement=moves and self.loss is None and self.n_steps < last)


def fingerprint(mask: Tensor) -> int:
    """Return a number that two different masks hardly share."""
    return int((mask.flatten().nonzero() * 2654435761 % 2147483647).sum())


def _rewind_step(recipe: Recipe, steps_per_epoch: int | None) -> int | None:
    """Return the step to which the recipe goes back."""
    steps = {
        _step_of(group.rewind, group.schedule, steps_per_epoch) for group in recipe.groups if group.rewind is not None
    }
    if len(steps) > 1:
        raise ValueError(f"all groups must rewind to one time, as the whole model goes back; got steps {sorted(steps)}")
    return steps.pop() if steps else None


def _step_of(time: float, schedule: Schedule, steps_per_epoch: int | None) -> int:
    """Return the step after which a time has come."""
    return math.ceil(time * ((steps_per_epoch or 1) if schedule.unit == "epochs" else 1) - 1e-6)


def _update_steps(
    number: int, schedule: Schedule, steps_per_epoch: int | None, total_steps: int | None
) -> dict[int, float]:
    """Map each step after which the masks move to the time, in the schedule's unit, whose target they get."""
    if schedule.unit == "epochs" and steps_per_epoch is None:
        raise ValueError(f"groups.{number}: the schedule is in epochs; give steps_per_epoch")
    updates = {_step_of(time, schedule, steps_per_epoch): time for time in schedule.update_times()}
    if total_steps is not None and max(updates) > total_steps:
        raise ValueError(
            f"groups.{number}: the schedule ends at step {max(updates)}, after the training's last, {total_steps}; "
            "the target would be missed"
        )
    return updates

"""A recipe followed inside a training loop."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sparsify.conversion.convert import sparse_layers
from sparsify.conversion.transaction import Transaction
from sparsify.distributed import ranks_of
from sparsify.errors import ScheduleWarning
from sparsify.layers.fsdp import shard_like
from sparsify.layers.sparse_training import SparseBackward, SparseTrainingKernels
from sparsify.masking.masks import is_empty, warn_removed_whole
from sparsify.masking.methods.registry import required_statistics
from sparsify.recipes.assignment import assign_layers
from sparsify.recipes.group_masks import group_masks
from sparsify.recipes.schema import HOLD, Group, Recipe
from sparsify.training.gradient_statistics import Evidence, accumulate_gradients, from_loss, refuse_unknown
from sparsify.training.mask_change import change_masks
from sparsify.training.mask_exchange import exchanged_masks
from sparsify.training.optimizer_state import forget, learning_rate
from sparsify.training.rewinding import copy_state, restore_state
from sparsify.training.targets import Count, check_beginning, check_end, check_step, counts
from sparsify.training.timeline import falling_steps, last_time, rewind_step, update_steps


class Pruner:
    """Follow a recipe's schedules: call `step()` after each `optimizer.step()`.

    Masks move when a schedule says so; in between, and whatever the optimizer does, masked weights are exactly zero
    (or out of sight, where a group has them `frozen` or `trained`, until its schedule ends). With the `optimizer`
    given, what it remembers of weights that go or come back (momentum, Adam's moments) is cleared.

    A sparsity that the model comes with is never lowered, unless the schedule itself falls ("steps", "alternating"): a
    layer keeps its mask until the target passes that. To begin lower, call `sparsify.prune` first. Masks that something
    else changes on the way, as an earlier checkpoint does, are noticed. A call that fails changes nothing.

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
        sparse_backward: SparseBackward = "never",
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
        if missing := [name for name, layer in self.layers.items() if layer.weight.is_meta]:
            raise ValueError(f"{missing[0]}: the weight is on the meta device and has no data; load the weights first")
        self.updates = [
            update_steps(number, group.schedule, steps_per_epoch, total_steps)
            for number, group in enumerate(recipe.groups)
        ]
        self._falls = [
            falling_steps(group.schedule, updates) for group, updates in zip(recipe.groups, self.updates, strict=True)
        ]
        self._rewind_step = rewind_step(recipe, steps_per_epoch)
        if optimizer is None and any(group.decay for group in recipe.groups):
            raise ValueError("'decay' of masked weights follows the learning rate; give the optimizer")
        if sparse_backward not in get_args(SparseBackward):
            raise ValueError(f"sparse_backward {sparse_backward!r} is none of: {', '.join(get_args(SparseBackward))}")
        self._movement: dict[str, Tensor] = {}
        self._gradient: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._fingerprints: dict[str, int] = {}
        self._given: dict[str, tuple[Tensor, int]] = {}
        if state is None:
            for number, (group, found) in enumerate(zip(recipe.groups, self._counts(None), strict=True)):
                check_beginning(number, group, self.layers, found)
        with self._all_or_nothing(changes_masks=True) as undo:
            for layer in self.layers.values():
                layer.training_kernels = (
                    None if sparse_backward == "never" else SparseTrainingKernels(sparse_backward == "always")
                )
            if state is not None:
                self._go_on_from(state)
            else:
                self._update(undo)
            self._request_statistics()

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
        self._notice_changes()
        due = any(self.n_steps + 1 in updates for updates in self.updates)
        with self._all_or_nothing(changes_masks=due) as undo:
            self.n_steps += 1
            self._collect_statistics()
            self._update(undo)
            for layer in self.layers.values():
                layer.zero_masked()
            self._decay()
            self._request_statistics()

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
        """Say that training is over; masked weights are zero from here on.

        Raises RuntimeError, naming the target, if a schedule has not come to its end, or if the masks are not those of
        its end, as after going back to an earlier checkpoint. A ScheduleWarning tells of masks that remove more.
        """
        for number, (group, updates) in enumerate(zip(self.recipe.groups, self.updates, strict=True)):
            if self.n_steps < max(updates):
                target = group.allocation if group.sparsity is None else group.sparsity
                raise RuntimeError(
                    f"groups.{number}: training ended at step {self.n_steps}, before the schedule did at step "
                    f"{max(updates)}; the target {target} was not reached, the sparsity is {self.sparsity:.4g}"
                )
        for number, found in enumerate(self._counts(None)):
            check_end(number, found)
        for layer in self.layers.values():
            layer.zero_masked()

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
        with self._all_or_nothing(changes_masks=True):
            self._go_on_from(state)
            self._request_statistics()

    def _go_on_from(self, state: Mapping[str, Any]) -> None:
        """Check a saved state, and take it over."""
        whole = isinstance(state.get("n_steps"), int) and isinstance(state.get("epoch_began"), int)
        parts = {key: state.get(key, {}) for key in ("masks", "movement", "gradient", "start")}
        if state.get("version") != 1 or not whole or not all(isinstance(part, Mapping) for part in parts.values()):
            raise ValueError(f"not a Pruner's state: {str(dict(state))[:200]}")
        if set(parts["masks"]) != set(self.layers):
            other = sorted(set(parts["masks"]) ^ set(self.layers))[0]
            raise ValueError(f"the state is of another recipe or model: {other!r} is in only one of both")
        for name, value in (*parts["movement"].items(), *parts["gradient"].items()):
            if name not in self.layers or value.shape != self.layers[name].mask.shape:
                raise ValueError(f"the state is of another recipe or model: {name!r} has other weights there")
        self.n_steps, self._epoch_began = state["n_steps"], state["epoch_began"]
        self._movement, self._gradient = dict(parts["movement"]), dict(parts["gradient"])
        self._start, self._fingerprints, self._given = dict(parts["start"]), dict(parts["masks"]), {}

    @contextlib.contextmanager
    def _all_or_nothing(self, *, changes_masks: bool) -> Iterator[Transaction]:
        """Leave model, optimizer and Pruner as they were if the block raises."""
        own = {key: value.copy() if isinstance(value, dict) else value for key, value in self.__dict__.items()}
        remembered = dict(self.optimizer.state) if self.optimizer is not None and changes_masks else {}
        try:
            with Transaction(*(self.layers.values() if changes_masks else ())) as undo:
                yield undo
        except BaseException:
            self.__dict__.update(own)
            if self.optimizer is not None:
                self.optimizer.state.update(remembered)
            raise

    def _counts(self, step: int | None) -> list[list[Count]]:
        """Count, for each group, what its masks remove beside the target of a step (None: of the end)."""
        found = []
        for group, names, updates in zip(self.recipe.groups, self.groups, self.updates, strict=True):
            time = last_time(updates, step) if step is not None else None
            begun = step is None or time is not None
            found.append(counts(group, {name: self.layers[name] for name in names}, time) if begun else [])
        return found

    def _notice_changes(self) -> None:
        """Warn if something else than this Pruner has given weights back since the last step."""
        changed = {name for name, mark in self._given.items() if not _same(mark, _mark(self.layers[name].mask))}
        if not changed:
            return
        for name in changed:
            layer = self.layers[name]
            if layer.masked_mode != "trained":
                forget(self.optimizer, layer.weight, ~layer.mask)
        for number, found in enumerate(self._counts(self.n_steps)):
            check_step(number, self.n_steps, [one for one in found if changed & set(one.names)])
        self._given = {name: _mark(layer.mask) for name, layer in self.layers.items()}

    def _check_masks(self) -> None:
        """Compare the masks with those that a state was saved with, once."""
        for name, expected in self._fingerprints.items():
            if fingerprint(self.layers[name].mask) != expected:
                raise ValueError(
                    f"{name}: its mask is not the one saved with the Pruner's state; load the model's state_dict after "
                    "making the Pruner, or give the state when making it: Pruner(..., state=...)"
                )
        self._fingerprints = {}

    def _update(self, undo: Transaction) -> None:
        """Move the masks of the groups whose time has come; all are known before the first changes."""
        if self.n_steps == self._rewind_step:
            self._start = copy_state(self.model)
        due = [number for number, updates in enumerate(self.updates) if self.n_steps in updates]
        masks: dict[str, Tensor] = {}
        for number in due:
            masks |= self._next_masks(number)
        self._check_ranks(masks)
        at_end = {number: self.n_steps == max(self.updates[number]) for number in due}
        masked_mode = {
            name: "zero" if at_end[number] else self.recipe.groups[number].masked
            for number in due
            for name in self.groups[number]
        }
        change_masks(self.layers, masks, masked_mode, self.optimizer, undo)
        if any(self.recipe.groups[number].rewind is not None for number in due):
            undo.keep((*self.model.parameters(), *self.model.buffers()))
            restore_state(self.model, self._start, self.optimizer)
            for layer in self.layers.values():
                layer.zero_masked()
        self._given = {name: _mark(layer.mask) for name, layer in self.layers.items()}

    def _next_masks(self, number: int) -> dict[str, Tensor]:
        """Return the masks that a group's layers get now; a sparsity that is there stays, unless the schedule falls."""
        group, names, updates = self.recipe.groups[number], self.groups[number], self.updates[number]
        time = updates[self.n_steps]
        present = {name: self.layers[name].matrix(self.layers[name].mask) for name in names}
        masks = group_masks(self.model, group, names, time, self._evidence(group, names, time), self.ranks)
        if self.n_steps not in self._falls[number]:
            masks = {n: mask if mask.sum() <= present[n].sum() else present[n] for n, mask in masks.items()}
        first, last = min(updates), max(updates)
        if group.regrow and self.n_steps > first:
            seen = {name: self._gradient.pop(name) for name in names if name in self._gradient}
            progress = (self.n_steps - first) / (last - first)
            layers = {name: self.layers[name] for name in names}
            masks = exchanged_masks(group, layers, masks, seen, step=self.n_steps, progress=progress, ranks=self.ranks)
        lost = {name: is_empty(mask) and not is_empty(present[name]) for name, mask in masks.items()}
        if group.method != HOLD:
            warn_removed_whole(lost, group.spec())
        return masks

    def _check_ranks(self, masks: Mapping[str, Tensor]) -> None:
        """Raise RuntimeError if processes that train one model have come to different masks."""
        if self.ranks.n > 1 and masks:
            marks = self.ranks.gather(torch.tensor([fingerprint(mask) for mask in masks.values()], device="cpu"))
            for name, differs in zip(masks, (marks != marks[0]).any(0).tolist(), strict=True):
                if differs:
                    raise RuntimeError(
                        f"{name}: the ranks have different masks, so their weights or gradients differ; give the "
                        "Pruner the model in its DDP wrapper, or after fully_shard"
                    )

    @torch.no_grad()
    def _decay(self) -> None:
        """Shrink masked weights that are trained, as weight decay would (SR-STE)."""
        rates = {
            name: group.decay * learning_rate(self.optimizer, self.layers[name].weight)
            for group, names in zip(self.recipe.groups, self.groups, strict=True)
            for name in names
            if self.optimizer is not None and group.decay and self.layers[name].masked_mode == "trained"
        }
        for name, rate in rates.items():
            layer = self.layers[name]
            mask = shard_like(layer.mask, layer.weight)
            layer.weight.copy_(torch.where(mask, layer.weight, layer.weight * (1 - rate)))

    def _evidence(self, group: Group, names: list[str], time: float) -> Evidence:
        """Return what the group's method asks for, as far as it is known, as matrices (out, in)."""
        asked = required_statistics(group.method) if group.method != HOLD else set()
        layers = {name: self.layers[name] for name in names}
        if not asked:
            return {}
        if self.loss is not None:
            found = from_loss(layers, self.loss, curvature="curvature" in asked, ranks=self.ranks)
        else:
            found = {name: {"movement": self._movement[name]} for name in names if name in self._movement}
        refuse_unknown(found, {name for one in counts(group, layers, time) if one.wanted for name in one.names})
        return {name: {key: layers[name].matrix(value) for key, value in of.items()} for name, of in found.items()}

    def _collect_statistics(self) -> None:
        """Take over what the backward passes of this step added up."""
        for name, layer in self.layers.items():
            if layer.accumulator is not None:
                self._accumulate(self._movement, name, layer.accumulator.movement)
                self._accumulate(self._gradient, name, layer.accumulator.gradient)

    def _accumulate(self, sums: dict[str, Tensor], name: str, seen: Tensor | None) -> None:
        """Add the mean over ranks of what one step showed; nothing where it overflowed, and AMP skipped the step."""
        seen = None if seen is None else self.ranks.mean(seen)
        if seen is not None and bool(torch.isfinite(seen).all()):
            sums[name] = (sums[name].to(seen.device) if name in sums else 0) + seen / self._scale

    def _request_statistics(self) -> None:
        """Ask the layers for what the next step has to show."""
        self._scale = self.scaler.get_scale() if self.scaler else 1.0
        for group, names, updates in zip(self.recipe.groups, self.groups, self.updates, strict=True):
            last = max(updates)
            gradient = bool(
                group.regrow
                and group.regrow.by == "gradient"
                and any(self.n_steps + ahead in updates for ahead in range(1, group.regrow.steps + 1))
            )
            moves = group.method != HOLD and "movement" in required_statistics(group.method)
            for name in names:
                layer = self.layers[name]
                layer.masked_mode = group.masked if min(updates) <= self.n_steps < last else "zero"
                accumulate_gradients(
                    layer, gradient=gradient, movement=moves and self.loss is None and self.n_steps < last
                )


def fingerprint(mask: Tensor) -> int:
    """Return a number that two different masks hardly share."""
    return int((mask.flatten().nonzero() * 2654435761 % 2147483647).sum())


def _mark(mask: Tensor) -> tuple[Tensor, int]:
    """Return what tells later whether a layer has got another mask, or this one other contents."""
    return mask, -1 if mask.is_inference() else mask._version


def _same(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    return one[0] is other[0] and one[1] == other[1]

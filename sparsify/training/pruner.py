"""A recipe followed inside a training loop."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sparsify.conversion.transaction import Transaction
from sparsify.distributed import ranks_of
from sparsify.errors import ScheduleWarning
from sparsify.layers.fsdp import shard_like
from sparsify.layers.sparse_training import SparseBackward, SparseTrainingKernels
from sparsify.masking.masks import is_empty, warn_removed_whole
from sparsify.recipes.assignment import assign_layers, converted_layers
from sparsify.recipes.group_masks import group_masks
from sparsify.recipes.schema import HOLD, Recipe
from sparsify.training.gradient_statistics import GradientSums, group_statistics, request_statistics
from sparsify.training.mask_change import change_masks
from sparsify.training.mask_exchange import exchanged_masks
from sparsify.training.optimizer_state import forget, learning_rate
from sparsify.training.rewinding import copy_state, restore_state
from sparsify.training.targets import Count, check_beginning, check_end, check_step, counts
from sparsify.training.timeline import falling_steps, last_time, rewind_step, update_steps


class Pruner:
    """Follow a recipe's schedules: call `step()` after each `optimizer.step()`.

    Masks move at the times of the schedules. In between, whatever the optimizer does, masked weights are exactly zero;
    or they have values outside of every output, if the group says `frozen` or `trained`, until its schedule ends.

    optimizer: its momentum, Adam's moments and the like of weights on their way out or back are cleared
    steps_per_epoch: needed by schedules in epochs; call `end_epoch()` after each epoch to have it checked
    total_steps: a schedule with a later end fails now, rather than miss its target
    loss: a function without arguments to the loss of some batch, for methods with gradients of one moment (snip, grasp)
    scaler: the GradScaler, if there is one
    state: a saved `state_dict()` to go on from, as by `load_state_dict`; the model may have been loaded before
    sparse_backward: training steps on the CPU touch kept weights only, forward and back: "never"; "auto", if measured
        to be faster at the first step after a change of masks; "always", wherever possible. Results are the same up to
        the order of additions; as "auto" chooses by time, two runs may round differently

    The sparsity of the model at the beginning is never lowered, unless the schedule itself falls ("steps",
    "alternating"): a layer keeps its mask until the target passes its sparsity. To begin lower, call `sparsify.prune`
    first. Changes of the masks by something else, such as an earlier checkpoint, are noticed. After an error, model,
    optimizer and Pruner are as before the call.

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
        self.groups = [list(weights) for weights in assign_layers(recipe, model)]
        self.layers = converted_layers(model, [name for names in self.groups for name in names])
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
        self._sums = GradientSums({}, {})
        self._start: dict[str, Tensor] = {}
        self._saved_fingerprints: dict[str, int] = {}
        self._mask_marks: dict[str, tuple[Tensor, int]] = {}
        if state is None:
            for number, (group, group_counts) in enumerate(zip(recipe.groups, self._counts(None), strict=True)):
                check_beginning(number, group, self.layers, group_counts)
        with self._all_or_nothing(changes_masks=True) as undo:
            for layer in self.layers.values():
                layer.training_kernels = (
                    None if sparse_backward == "never" else SparseTrainingKernels(sparse_backward == "always")
                )
            if state is not None:
                self._go_on_from(state)
            else:
                self._update(undo)
            self._prepare_step()

    @property
    def sparsity(self) -> float:
        """The fraction of masked weights over all layers of the recipe."""
        total = sum(layer.mask.numel() for layer in self.layers.values())
        return sum(int((~layer.mask).sum()) for layer in self.layers.values()) / max(total, 1)

    def metrics(self) -> dict[str, float]:
        """Return the sparsity, of all and of each layer, by names in groups for loggers such as TensorBoard."""
        return {"sparsity": self.sparsity} | {f"sparsity/{name}": layer.sparsity for name, layer in self.layers.items()}

    def step(self) -> None:
        """Follow one optimizer step: move the masks if it is time, and keep masked weights at zero."""
        self._check_masks()
        self._notice_changes()
        due = any(self.n_steps + 1 in updates for updates in self.updates)
        with self._all_or_nothing(changes_masks=due) as undo:
            self.n_steps += 1
            self._sums = self._sums.add_step(self.layers, self._scale, self.ranks)
            self._update(undo)
            for layer in self.layers.values():
                layer.zero_masked()
            self._decay()
            self._prepare_step()

    def end_epoch(self) -> None:
        """End an epoch; a ScheduleWarning tells if its length is not the `steps_per_epoch` of the schedules.

        After a run went on in the middle of an epoch, this epoch counts from its beginning.
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
        """End the training; masked weights are zero from here on.

        Raises RuntimeError, naming the target, if a schedule has not come to its end, or if the masks are below its
        final target, as after going back to an earlier checkpoint. A ScheduleWarning tells of masks above the target.
        """
        for number, (group, updates) in enumerate(zip(self.recipe.groups, self.updates, strict=True)):
            if self.n_steps < max(updates):
                target = group.allocation if group.sparsity is None else group.sparsity
                raise RuntimeError(
                    f"groups.{number}: training ended at step {self.n_steps}, before the schedule did at step "
                    f"{max(updates)}; the target {target} was not reached, the sparsity is {self.sparsity:.4g}"
                )
        for number, group_counts in enumerate(self._counts(None)):
            check_end(number, group_counts)
        for layer in self.layers.values():
            layer.zero_masked()

    def state_dict(self) -> dict[str, Any]:
        """Return the state to go on from later, between two steps; weights and masks are in the model's state_dict."""
        return {
            "version": 1,
            "n_steps": self.n_steps,
            "epoch_began": self._epoch_began,
            "movement": dict(self._sums.movement),
            "gradient": dict(self._sums.gradient),
            "start": dict(self._start),
            "masks": {name: fingerprint(layer.mask) for name, layer in self.layers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; load the model's and the optimizer's state_dict as well, after making the Pruner.

        Raises ValueError for a state of another kind; the next step raises one if the masks are not those of the state.
        """
        with self._all_or_nothing(changes_masks=True):
            self._go_on_from(state)
            self._prepare_step()

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
        self._sums = GradientSums(dict(parts["movement"]), dict(parts["gradient"]))
        self._start, self._saved_fingerprints, self._mask_marks = dict(parts["start"]), dict(parts["masks"]), {}

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
        """Count the removed units of each group beside the target of a step (None: of the end)."""
        of_groups = []
        for group, names, updates in zip(self.recipe.groups, self.groups, self.updates, strict=True):
            time = last_time(updates, step) if step is not None else None
            begun = step is None or time is not None
            of_groups.append(counts(group, {name: self.layers[name] for name in names}, time) if begun else [])
        return of_groups

    def _notice_changes(self) -> None:
        """Warn if something else than this Pruner has given weights back since the last step."""
        changed = {name for name, mark in self._mask_marks.items() if not _same(mark, _mark(self.layers[name].mask))}
        if not changed:
            return
        for name in changed:
            layer = self.layers[name]
            if layer.masked_mode != "trained":
                forget(self.optimizer, layer.weight, ~layer.mask)
        for number, group_counts in enumerate(self._counts(self.n_steps)):
            check_step(number, self.n_steps, [count for count in group_counts if changed & set(count.names)])
        self._mask_marks = {name: _mark(layer.mask) for name, layer in self.layers.items()}

    def _check_masks(self) -> None:
        """Compare the masks with the fingerprints of a loaded state, once."""
        for name, expected in self._saved_fingerprints.items():
            if fingerprint(self.layers[name].mask) != expected:
                raise ValueError(
                    f"{name}: its mask is not the one saved with the Pruner's state; load the model's state_dict after "
                    "making the Pruner, or give the state when making it: Pruner(..., state=...)"
                )
        self._saved_fingerprints = {}

    def _update(self, undo: Transaction) -> None:
        """Move the masks of the groups with an update at this step; all are known before the first changes."""
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
        self._mask_marks = {name: _mark(layer.mask) for name, layer in self.layers.items()}

    def _next_masks(self, number: int) -> dict[str, Tensor]:
        """Return the next masks of a group's layers; their sparsity does not fall, unless the schedule does."""
        group, names, updates = self.recipe.groups[number], self.groups[number], self.updates[number]
        time = updates[self.n_steps]
        present = {name: self.layers[name].matrix(self.layers[name].mask) for name in names}
        layers = {name: self.layers[name] for name in names}
        statistics = group_statistics(group, layers, time, self._sums, self.loss, self.ranks)
        masks = group_masks(self.model, group, names, time, statistics, self.ranks)
        if self.n_steps not in self._falls[number]:
            masks = {n: mask if mask.sum() <= present[n].sum() else present[n] for n, mask in masks.items()}
        first, last = min(updates), max(updates)
        if group.regrow and self.n_steps > first:
            gradients, step = self._sums.gradient, self.n_steps
            progress = (step - first) / (last - first)
            masks = exchanged_masks(group, layers, masks, gradients, step=step, progress=progress, ranks=self.ranks)
            self._sums = self._sums.without_gradients(names)
        lost = {name: is_empty(mask) and not is_empty(present[name]) for name, mask in masks.items()}
        if group.method != HOLD:
            warn_removed_whole(lost, group.spec())
        return masks

    def _check_ranks(self, masks: Mapping[str, Tensor]) -> None:
        """Raise RuntimeError if the ranks of one training have come to different masks."""
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
        """Shrink trained masked weights, as weight decay would (SR-STE)."""
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

    def _prepare_step(self) -> None:
        """Prepare the layers for the next step: its statistics, and the values of masked weights."""
        self._scale = self.scaler.get_scale() if self.scaler else 1.0
        for group, names, updates in zip(self.recipe.groups, self.groups, self.updates, strict=True):
            layers = {name: self.layers[name] for name in names}
            request_statistics(group, layers, updates, self.n_steps, from_loss=self.loss is not None)
            for layer in layers.values():
                layer.masked_mode = group.masked if min(updates) <= self.n_steps < max(updates) else "zero"


def fingerprint(mask: Tensor) -> int:
    """Return a checksum of a mask."""
    return int((mask.flatten().nonzero() * 2654435761 % 2147483647).sum())


def _mark(mask: Tensor) -> tuple[Tensor, int]:
    """Return a mask and its version, to be compared later: another mask or other contents differ."""
    return mask, -1 if mask.is_inference() else mask._version


def _same(before: tuple[Tensor, int], now: tuple[Tensor, int]) -> bool:
    return before[0] is now[0] and before[1] == now[1]

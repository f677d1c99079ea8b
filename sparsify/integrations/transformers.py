"""A recipe followed by transformers' Trainer: `Trainer(..., callbacks=[PrunerCallback(recipe)])`."""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sparsify.errors import ScheduleWarning
from sparsify.recipes.schema import Recipe
from sparsify.training.pruner import Pruner

_FILE = "pruner.pt"


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE


def _options(options: dict[str, Any], args: Any, state: Any) -> dict[str, Any]:
    """Add the state beside the checkpoint of a resumed run, unless the options have one."""
    if not state.global_step or "state" in options:
        return options
    file = _file(args, state)
    if not file.exists():
        raise ValueError(
            f"{file} is missing: the run ended while this checkpoint was written, or it lies in another folder; go on "
            "from an earlier one, or give its content as PrunerCallback(recipe, state=torch.load(...))"
        )
    return {**options, "state": torch.load(file, weights_only=True)}


class PrunerCallback(TrainerCallback):
    """Make a Pruner of the Trainer's converted model, step it, and save it with each checkpoint.

    `options` go to the Pruner. Sparsity is in the logs, and with the loss in TensorBoard if the Trainer reports there.
    """

    def __init__(self, recipe: Recipe, **options: Any) -> None:
        self.recipe, self.options = recipe, options
        self.pruner: Pruner | None = None
        self.writer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Begin, or go on from the checkpoint loaded by the Trainer."""
        n_steps = math.ceil(len(parts["train_dataloader"]) / args.gradient_accumulation_steps)
        self.pruner = Pruner(
            parts["model"],
            self.recipe,
            optimizer=parts["optimizer"],
            steps_per_epoch=n_steps,
            total_steps=state.max_steps,
            **_options(self.options, args, state),
        )
        if "tensorboard" in args.report_to and find_spec("tensorboard") and state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(Path(args.output_dir) / "runs" / "sparsity"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Step the Pruner."""
        assert self.pruner is not None
        self.pruner.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **parts: Any) -> None:
        """Add the sparsity to the log."""
        if self.pruner is None or logs is None or "loss" not in logs:
            return
        logs |= {"sparsity": self.pruner.sparsity}
        for name, value in (self.pruner.metrics() | {"loss": float(logs["loss"])}).items() if self.writer else ():
            self.writer.add_scalar(name, value, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Save the Pruner's state beside the Trainer's."""
        if self.pruner is not None and state.is_world_process_zero:
            file = _file(args, state)
            unfinished = file.with_suffix(".unfinished")
            torch.save(self.pruner.state_dict(), unfinished)
            unfinished.replace(file)  # whole or not there, whenever the run is killed

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Warn if the target was missed."""
        if self.writer:
            self.writer.close()
        try:
            if self.pruner is not None:
                self.pruner.finish()
        except RuntimeError as error:
            warnings.warn(str(error), ScheduleWarning, stacklevel=2)

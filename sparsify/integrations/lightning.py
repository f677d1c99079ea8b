"""A recipe followed by Lightning's Trainer: `Trainer(callbacks=[PrunerCallback(recipe)])`."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.swa_utils import AveragedModel

from sparsify.errors import ScheduleWarning
from sparsify.layers import MaskedLayer
from sparsify.recipes.schema import Recipe
from sparsify.training.pruner import Pruner


def share_masks(trainer: Trainer, pruner: Pruner) -> None:
    """Give a Pruner's masks to the averages kept by callbacks of Lightning: an average of masks keeps everything."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        average = average.module if isinstance(average, AveragedModel) else average
        if isinstance(average, torch.nn.Module):
            for name, layer in pruner.layers.items():
                twin = average.get_submodule(name)
                if isinstance(twin, MaskedLayer) and not torch.equal(twin.mask, layer.mask.to(twin.mask.device)):
                    twin.set_mask(layer.matrix(layer.mask))


class PrunerCallback(Callback):
    """Make a Pruner of a converted LightningModule, step it, and save it with each checkpoint.

    For one optimizer; `options` go to the Pruner. Sparsity goes to the loggers and the progress bar, the masks to the
    averages of other callbacks.
    """

    def __init__(self, recipe: Recipe, **options: Any) -> None:
        self.recipe, self.options = recipe, options
        self.pruner: Pruner | None = None
        self._state: dict[str, Any] | None = None
        self._n_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on from the checkpoint loaded by Lightning."""
        self.pruner = Pruner(
            pl_module,
            self.recipe,
            optimizer=trainer.optimizers[0],
            steps_per_epoch=math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches),
            total_steps=int(trainer.estimated_stepping_batches),
            state=self._state,
            **self.options,
        )
        self._n_steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Step, if the optimizer did."""
        assert self.pruner is not None
        if trainer.global_step > self._n_steps:
            self._n_steps = trainer.global_step
            self.pruner.step()
            share_masks(trainer, self.pruner)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("sparsity", self.pruner.sparsity, prog_bar=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the pace."""
        assert self.pruner is not None
        share_masks(trainer, self.pruner)
        self.pruner.end_epoch()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the target was missed, after all callbacks: some have put average weights into the model."""
        try:
            if self.pruner is not None:
                self.pruner.finish()
        except RuntimeError as error:
            warnings.warn(str(error), ScheduleWarning, stacklevel=2)

    on_test_start = on_fit_end  # the same of a checkpoint loaded after the training, such as ckpt_path="best"

    def state_dict(self) -> dict[str, Any]:
        """Return the Pruner's state, for Lightning's checkpoint."""
        return self.pruner.state_dict() if self.pruner is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state for the beginning of the training."""
        self._state = state_dict or None

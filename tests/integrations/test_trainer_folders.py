"""A Trainer saves and resumes a masked model, and its checkpoints are folders like any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import TOKENS, masked, outputs
from torch import nn

import sparsify
from sparsify.checkpoint.folder import kind_of
from sparsify.integrations.transformers import PrunerCallback

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # transformers warns of itself
]
RECIPE = sparsify.Recipe.model_validate(
    {"groups": [{"sparsity": 0.9, "schedule": {"kind": "polynomial", "initial": 0.7, "end": 4, "every": 1}}]}
)
EXAMPLES = [{"input_ids": row, "labels": row} for row in TOKENS.reshape(8, 3)]


def trainer(model: nn.Module, folder: Path, n_steps: int) -> transformers.Trainer:
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        seed=0,
    )
    return transformers.Trainer(model=model, args=settings, train_dataset=EXAMPLES, callbacks=[PrunerCallback(RECIPE)])


def trained(folder: Path, *, resume: Path | None = None, start: Path) -> Any:
    model = transformers.AutoModelForMaskedLM.from_pretrained(start)
    trainer(model, folder, 6).train(resume_from_checkpoint=None if resume is None else str(resume))
    return model.eval()


def test_resumed_in_a_model_from_a_folder(tmp_path: Path) -> None:
    masked("bert").save_pretrained(tmp_path / "start")
    whole = trained(tmp_path / "whole", start=tmp_path / "start")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = trained(tmp_path / "again", start=tmp_path / "start", resume=tmp_path / "again" / "checkpoint-2")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    layers = [m for m in whole.modules() if isinstance(m, sparsify.SparseLinear)]
    assert all(round(layer.sparsity, 2) == 0.9 for layer in layers)
    last = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert kind_of(last) == "masked"
    assert torch.equal(outputs("bert", last)["logits"], outputs("bert", whole)["logits"])


def test_layers_on_several_devices(tmp_path: Path) -> None:
    """A device map with "disk" makes accelerate put a hook on each layer; the layers are exchanged under them."""
    model = sparsify.export(masked("bert"), format="csr")
    model.save_pretrained(tmp_path / "model")
    places = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "disk", "bert.encoder.layer.1": "cpu", "cls": "cpu"}
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert kind_of(loaded) == "packed"
    assert any(hasattr(m, "_hf_hook") for m in loaded.modules() if isinstance(m, sparsify.CSRLinear))
    assert torch.equal(outputs("bert", loaded)["logits"], outputs("bert", model)["logits"])

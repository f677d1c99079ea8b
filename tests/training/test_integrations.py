"""The callbacks in real Trainers: the target is met, a run goes on where it stopped, TensorBoard can be read."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsify

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # these libraries warn of themselves and of each other
]

RECIPE = sparsify.Recipe.model_validate(
    {
        "groups": [
            {
                "sparsity": 0.8,
                "regrow": {"by": "gradient"},
                "schedule": {"kind": "polynomial", "unit": "epochs", "end": 2.5, "every": 0.25},
            }
        ]
    }
)
N_EXAMPLES, BATCH, ACCUMULATE, EPOCHS = 64, 4, 2, 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return sparsify.convert(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N_EXAMPLES, 8, generator=generator), torch.randint(4, (N_EXAMPLES,), generator=generator)


def assert_pruned(model: nn.Module) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, sparsify.SparseLinear)]
    assert [int((~layer.mask).sum()) for layer in layers] == [round(0.8 * 128), round(0.8 * 64)]
    assert all(torch.count_nonzero(layer.weight[~layer.mask]) == 0 for layer in layers)


def scalars(folder: Path, tag: str) -> list[float]:
    """Read a curve as TensorBoard does."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [event.value for event in accumulator.Scalars(tag)]


class Wrapped(nn.Module):
    """A model for transformers' Trainer: it takes named tensors and returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from sparsify.integrations.transformers import PrunerCallback

    x, y = examples()
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def trainer(folder: Path):
        arguments = transformers.TrainingArguments(
            str(folder),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATE,
            save_steps=9,
            logging_steps=2,
            report_to=["tensorboard"],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = Wrapped()
        return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[PrunerCallback(RECIPE)]), model

    whole, model = trainer(tmp_path)
    whole.train()
    assert_pruned(model)
    curve = scalars(tmp_path / "runs" / "sparsity", "sparsity")
    assert curve == sorted(curve)
    assert len(curve) == 12
    assert curve[-1] == pytest.approx(0.8, abs=0.01)
    assert len(scalars(tmp_path / "runs" / "sparsity", "loss")) == 12

    again, resumed = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_transformers_trainer_that_goes_back_to_its_best_checkpoint_says_so(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from sparsify.integrations.transformers import PrunerCallback

    x, y = examples()
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    seen = []

    def trainer(output: str, callback: PrunerCallback):
        arguments = transformers.TrainingArguments(
            str(tmp_path / output),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATE,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="epochs_left",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return transformers.Trainer(
            Wrapped(),
            arguments,
            train_dataset=data,
            eval_dataset=data[:4],
            compute_metrics=lambda _: seen.append(0) or {"epochs_left": -len(seen)},  # the first epoch is the best
            callbacks=[callback],
        )

    callback = PrunerCallback(RECIPE)
    with pytest.warns(sparsify.ScheduleWarning, match=r"the masks miss the target, net.0: 0\.\d+ instead of"):
        trainer("first", callback).train()
    assert callback.pruner is not None
    assert callback.pruner.sparsity < 0.7

    (tmp_path / "first" / "checkpoint-8" / "pruner.pt").rename(tmp_path / "kept.pt")
    checkpoint = str(tmp_path / "first" / "checkpoint-8")
    with pytest.raises(ValueError, match=r"checkpoint-8/pruner.pt is missing: the run ended while"):
        trainer("first", PrunerCallback(RECIPE)).train(resume_from_checkpoint=checkpoint)
    saved = torch.load(tmp_path / "kept.pt", weights_only=True)
    with pytest.warns(sparsify.ScheduleWarning, match="the masks miss the target"):
        trainer("second", PrunerCallback(RECIPE, state=saved)).train(resume_from_checkpoint=checkpoint)


def test_lightning_trainer(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    from sparsify.integrations.lightning import PrunerCallback

    x, y = examples()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    class SaveAfterFirstEpoch(lightning.Callback):
        def on_train_epoch_end(self, trainer, _):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    def fit(name: str, checkpoint: Path | None = None) -> nn.Module:
        model = Module()
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), BATCH)
        trainer = lightning.Trainer(
            max_epochs=EPOCHS,
            accumulate_grad_batches=ACCUMULATE,
            log_every_n_steps=1,
            logger=loggers.TensorBoardLogger(str(tmp_path), name=name, version=""),
            callbacks=[PrunerCallback(RECIPE), SaveAfterFirstEpoch()],
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, data, ckpt_path=checkpoint)
        return model

    whole = fit("whole")
    assert_pruned(whole)
    curve = scalars(tmp_path / "whole", "sparsity")
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(0.8, abs=0.01)
    assert scalars(tmp_path / "whole", "loss")
    resumed = fit("resumed", tmp_path / "first.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("averaging", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
@pytest.mark.parametrize("first", [True, False])
def test_lightning_averages_have_the_final_masks(averaging: str, first: bool, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    from sparsify.integrations.lightning import PrunerCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    options = {
        "StochasticWeightAveraging": {"swa_lrs": 0.01, "swa_epoch_start": 1},
        "WeightAveraging": {"use_buffers": False},  # torch's plain mean does not know bool buffers
        "EMAWeightAveraging": {},
    }
    both = [getattr(callbacks, averaging)(**options[averaging]), PrunerCallback(RECIPE)]
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATE,
        logger=False,
        callbacks=both if first else both[::-1],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    model = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), BATCH)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(model, data)
    assert_pruned(model)
    assert not any("miss the target" in str(one.message) for one in said)


@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_a_callback_is_short(name: str) -> None:
    file = Path(sparsify.__file__).parent / "integrations" / f"{name}.py"
    text = file.read_text()
    body = text[text.index("class PrunerCallback") :].splitlines()
    assert len(body) < 60

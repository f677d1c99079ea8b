"""The callbacks in real Trainers: the target is met, a run goes on where it stopped, TensorBoard can be read."""

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
    """What transformers' Trainer trains: it takes named tensors and returns a loss."""

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


@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_a_callback_is_short(name: str) -> None:
    file = Path(sparsify.__file__).parent / "integrations" / f"{name}.py"
    text = file.read_text()
    body = text[text.index("class PrunerCallback") :].splitlines()
    assert len(body) < 60

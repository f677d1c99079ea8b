"""A training that was stopped, at any step and in any way, goes on as if it had not been."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import interrupted
import pytest
import torch

import sparsify

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(interrupted.__file__)


def finish(folder: Path) -> dict:
    subprocess.run([sys.executable, SCRIPT, folder], check=True, capture_output=True)
    return torch.load(folder / "end.pt", weights_only=True)


def kill_at(folder: Path, step: int) -> None:
    """Start the training and kill it as soon as it says that a step is done."""
    with subprocess.Popen([sys.executable, SCRIPT, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == step:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    assert process.returncode == -signal.SIGKILL


def assert_same(one: object, other: object, where: str = "") -> None:
    """Compare nested states bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}.{i}")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def course(one_thread: None) -> list[dict]:
    """Return the state after each step of one uninterrupted run in this process."""
    model, optimizer, pruner = interrupted.parts()
    states = []

    def note() -> None:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
        states.append(torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved))

    note()
    for step in range(interrupted.N_STEPS):
        one_step(model, optimizer, pruner, step)
        note()
    return states


def one_step(model, optimizer, pruner, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(32, 16, generator=generator), torch.randint(4, (32,), generator=generator)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    pruner.step()


def test_a_killed_training_ends_as_an_uninterrupted_one(tmp_path: Path, course: list[dict]) -> None:
    kill_at(tmp_path, random.Random(0).randrange(4, interrupted.N_STEPS - 10))
    resumed = finish(tmp_path)
    assert 4 <= resumed.pop("first") < interrupted.N_STEPS
    assert_same({key: course[-1][key] for key in resumed}, resumed)


@pytest.mark.parametrize("order", ["pruner first", "model first"])
def test_every_step_can_be_gone_on_from(course: list[dict], order: str) -> None:
    for stopped in range(0, interrupted.N_STEPS, 1 if order == "pruner first" else 7):
        model, optimizer, pruner = interrupted.parts()
        saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, course[stopped])
        optimizer.load_state_dict(saved["optimizer"])
        model.load_state_dict(saved["model"])
        if order == "model first":
            pruner = sparsify.Pruner(model, interrupted.RECIPE, optimizer=optimizer, state=saved["pruner"])
        else:
            pruner.load_state_dict(saved["pruner"])
        one_step(model, optimizer, pruner, stopped)
        now = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
        assert_same(course[stopped + 1], now, f"after step {stopped + 1}")


def test_a_state_without_its_model_is_noticed(course: list[dict]) -> None:
    model, optimizer, pruner = interrupted.parts()
    pruner.load_state_dict(course[20]["pruner"])
    with pytest.raises(ValueError, match=r"its mask is not the one saved.*Pruner\(\.\.\., state=\.\.\.\)"):
        one_step(model, optimizer, pruner, 20)


def test_a_state_of_another_recipe_is_refused(course: list[dict]) -> None:
    model, _, _ = interrupted.parts()
    with pytest.raises(ValueError, match="'0' is in only one of both"):
        sparsify.Pruner(
            model, sparsify.Recipe(groups=[{"layers": ["2", "4", "6"], "sparsity": 0.5}]), state=course[5]["pruner"]
        )


def test_another_pace_than_told_is_said() -> None:
    model = sparsify.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)))
    schedule = {"kind": "one-shot", "unit": "epochs", "start": 2}
    recipe = sparsify.Recipe(groups=[{"sparsity": 0.5, "schedule": schedule}])
    pruner = sparsify.Pruner(model, recipe, steps_per_epoch=4)
    for _ in range(4):
        pruner.step()
    pruner.end_epoch()
    for _ in range(3):
        pruner.step()
    with pytest.warns(sparsify.ScheduleWarning, match=r"had 3 optimizer steps, but steps_per_epoch=4: .* epoch 2\.667"):
        pruner.end_epoch()
    with pytest.raises(RuntimeError, match=r"groups\.0: training ended at step 7, before .* step 8; the target 0\.5"):
        pruner.finish()
    pruner.step()
    pruner.finish()
    assert pruner.metrics() == {"sparsity": 0.5, "sparsity/0": 0.5}

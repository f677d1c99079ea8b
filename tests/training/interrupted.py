"""A small training with a checkpoint after each step, to be killed and run again; started by test_resume.py.

python tests/training/interrupted.py FOLDER: goes on from FOLDER/checkpoint.pt if there is one, prints each step, and
leaves the end in FOLDER/end.pt.
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sparsify

N_STEPS = 40
RECIPE = sparsify.Recipe(
    groups=[
        {
            "layers": ["0"],
            "sparsity": 0.8,
            "regrow": {"by": "gradient", "steps": 2},
            "schedule": {"kind": "constant", "end": 30, "every": 3},
        },
        {
            "layers": ["2"],
            "sparsity": 0.9,
            "method": "movement",
            "masked": "frozen",
            "schedule": {"kind": "polynomial", "start": 4, "end": 32, "every": 2},
        },
        {
            "layers": ["4"],
            "pattern": "2:4",
            "masked": "trained",
            "decay": 0.1,
            "schedule": {"kind": "constant", "end": 34, "every": 1},
        },
        {
            "layers": ["6"],
            "sparsity": 0.75,
            "rewind": 3,
            "schedule": {"kind": "exponential", "start": 3, "end": 27, "every": 8},
        },
    ]
)


def parts() -> tuple[nn.Module, torch.optim.Optimizer, sparsify.Pruner]:
    """Make everything anew."""
    torch.manual_seed(0)
    model = sparsify.convert(
        nn.Sequential(
            *(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh()),
            *(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4)),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return model, optimizer, sparsify.Pruner(model, RECIPE, optimizer=optimizer)


def train(folder: Path) -> None:
    """Train to the end, from the checkpoint if there is one."""
    model, optimizer, pruner = parts()
    checkpoint = folder / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        pruner.load_state_dict(saved["pruner"])
    for step in range(first, N_STEPS):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(32, 16, generator=generator), torch.randint(4, (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "pruner": pruner.state_dict()}, folder / "new.pt")
        os.replace(folder / "new.pt", checkpoint)
        print(step + 1, flush=True)
    pruner.finish()
    torch.save({"first": first, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "end.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))

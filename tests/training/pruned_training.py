"""A small training loop with a Pruner."""

import torch
import torch.nn.functional as F
from torch import nn

import sparsify

LINEAR = {"kind": "linear", "end": 8, "every": 2}


def net():
    torch.manual_seed(0)
    return sparsify.convert(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)))


def recipe(**group):
    return sparsify.Recipe(groups=[{"sparsity": 0.9, "schedule": LINEAR, **group}])


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randint(4, (8,), generator=generator)


def train(model, pruner, optimizer, steps):
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()


def start(model=None, **group):
    model = net() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer, sparsify.Pruner(model, recipe(**group), optimizer=optimizer)

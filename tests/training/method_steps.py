"""A small model in training, its gradients, and the largest of some scores."""

import torch
import torch.nn.functional as F
from torch import nn

import sparsify
from sparsify.layers import MaskedLayer

LR = 0.1


def net(seed=0):
    torch.manual_seed(seed)
    return sparsify.convert(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)))


def batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 12, generator=generator), torch.randint(4, (size,), generator=generator)


def layers(model):
    return [module for module in model.modules() if isinstance(module, MaskedLayer)]


def recipe(**group):
    return sparsify.Recipe(groups=[group])


def constant(end, every=1):
    return {"kind": "constant", "end": end, "every": every}


def train(model, pruner, optimizer, n_steps, first=0, look=lambda step: None):
    for step in range(first, first + n_steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        look(step)
        optimizer.step()
        pruner.step()


def used_gradients(model, x, y):
    """Return the gradients of the weights as they are used, masked ones included, from a dense copy of the model."""
    used = [nn.Parameter(layer.masked_weight().detach()) for layer in layers(model)]
    hidden = torch.tanh(F.linear(x, used[0], model[0].bias))
    return torch.autograd.grad(F.cross_entropy(F.linear(hidden, used[1], model[2].bias), y), used)


def largest(scores, n_keep):
    """Keep the n_keep largest of one or more tensors together, by a sort."""
    flat = torch.cat([score.flatten() for score in scores])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:n_keep]] = True
    return [k.view_as(s) for k, s in zip(kept.split([s.numel() for s in scores]), scores, strict=True)]

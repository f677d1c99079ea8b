"""A failure anywhere in pruning leaves the model as it was."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import Recipe, apply, convert, prune, recover
from sparsify.pruning.sensitivity import measure_sensitivity

PACKAGE = str(Path(sparsify.__file__).parent)
#: Files whose functions put things back: one that fails itself cannot.
PUTTING_BACK = (str(Path(PACKAGE) / "conversion" / "transaction.py"),)
#: The end of a generator, and files closed when all is done.
NO_STEPS = ("<genexpr>", "__exit__", "close", "_forget", "give_back")
X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


DATA = [{"x": X.view(2, 6, 8), "attention_mask": MASK}]


def pruned() -> nn.Module:
    """A model that was pruned on data before, trains, and has a gradient and a hook."""
    torch.manual_seed(0)
    net = prune(convert(Net()), 0.25, method="wanda", data=DATA).train()
    net.blocks[0].up.weight.grad = torch.ones(8, 8)
    net.head.weight.requires_grad_(False)
    net.blocks[1].register_forward_hook(lambda *_: None)
    return net


TEACHER = pruned()
RECIPE: dict[str, Any] = {"groups": [{"sparsity": 0.5, "method": "wanda"}], "recover": {"steps": 1}}

VERBS: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda net: prune(net, 0.5),
    "prune on data": lambda net: prune(net, 0.5, method="sparsegpt", correct=True, data=DATA),
    "prune within a budget": lambda net: prune(net, 0.5, method="wanda", data=DATA, cache_bytes=0),
    "measured": lambda net: prune(net, 0.5, method="wanda", allocation="error", data=DATA),
    "recover": lambda net: recover(net, TEACHER, DATA, steps=2),
    "sensitivity": lambda net: measure_sensitivity(net, DATA, sparsities=(0.5,)),
    "apply": lambda net: apply(net, Recipe(groups=[{"sparsity": 0.5}])),
    "apply and recover": lambda net: apply(net, Recipe(**RECIPE), data=DATA),
}


def look(net: nn.Module) -> list[Any]:
    """Everything there is to a model, by value or identity."""
    found: list[Any] = []
    for name, module in net.named_modules():
        found += [name, type(module), module.training, module.__dict__.get("forward"), module.__dict__.get("fit")]
        found += [list(module._forward_hooks), list(module._forward_pre_hooks)]
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found += [key, id(tensor), tensor.requires_grad, tensor.tolist(), id(tensor.grad)]
    return found


class Stop(BaseException):
    """Like KeyboardInterrupt: nothing but a clean-up sees it."""


class At:
    """Raise Stop at the n-th call of a function of the package; 0 only counts."""

    def __init__(self, n: int) -> None:
        self.n, self.n_seen, self.where = n, 0, ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        inside = file.startswith(PACKAGE) and file not in PUTTING_BACK
        if event != "call" or self.where or not inside or frame.f_code.co_name in NO_STEPS:
            return
        self.n_seen += 1
        if self.n_seen == self.n:
            self.where = f"step {self.n}, {file}: {frame.f_code.co_name}"
            raise Stop

    def run(self, call: Callable[[nn.Module], object], net: nn.Module) -> None:
        sys.setprofile(self)
        try:
            call(net)
        except Stop:
            pass
        finally:
            sys.setprofile(None)


@pytest.mark.parametrize("verb", VERBS)
def test_a_failure_at_any_step_leaves_the_model_as_it_was(verb: str) -> None:
    counter = At(0)
    counter.run(VERBS[verb], pruned())
    assert counter.n_seen > 5
    teacher = look(TEACHER)
    for n in range(1, counter.n_seen + 1, max(counter.n_seen // 12, 1)):
        net, at = pruned(), At(n)
        before = look(net)
        at.run(VERBS[verb], net)
        assert at.where
        assert look(net) == before, at.where
    assert look(TEACHER) == teacher

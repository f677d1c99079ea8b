"""A failure anywhere in pruning leaves the model as it was."""

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import Recipe, apply, convert, prune, recover
from sparsify.layers.records import pruning_result
from sparsify.pruning.sensitivity import measure_sensitivity

PACKAGE = str(Path(sparsify.__file__).parent)
#: The file that undoes changes: a failure inside it cannot be undone.
ROLLBACK = str(Path(PACKAGE) / "conversion" / "transaction.py")
#: The end of a generator, and files closed when all is done.
NO_STEPS = ("<genexpr>", "__exit__", "close", "_forget", "give_back")
#: Steps of each verb that fail, from the first to the last at equal distances.
N_FAILURES = 6
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


@functools.cache
def pruned_once() -> nn.Module:
    torch.manual_seed(0)
    return prune(convert(Net()), 0.25, method="wanda", data=DATA).train()


def pruned() -> nn.Module:
    """A model that was pruned on data before, trains, and has a gradient and a hook."""
    net = copy.deepcopy(pruned_once())
    net.blocks[0].up.weight.grad = torch.ones(8, 8)
    net.head.weight.requires_grad_(False)
    net.blocks[1].register_forward_hook(lambda *_: None)
    return net


TEACHER = pruned()
nn.init.ones_(TEACHER.blocks[0].down.weight)  # a teacher of its own: something to learn
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
        found += [name, type(module), module.training, module.__dict__.get("forward"), pruning_result(module)]
        found += [list(module._forward_hooks), list(module._forward_pre_hooks)]
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found += [key, id(tensor), tensor.requires_grad, tensor.tolist(), id(tensor.grad)]
    return found


class Interrupt(BaseException):
    """Like KeyboardInterrupt: nothing but a clean-up sees it."""


@functools.cache
def is_step(code: CodeType) -> bool:
    """Return whether a function is one of the package, and neither a clean-up nor the end of a generator."""
    return code.co_filename.startswith(PACKAGE) and code.co_filename != ROLLBACK and code.co_name not in NO_STEPS


class InterruptAt:
    """Raise Interrupt at the n-th call of a function of the package; 0 only counts."""

    def __init__(self, n: int) -> None:
        self.n, self.n_seen, self.where = n, 0, ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not is_step(frame.f_code):
            return
        self.n_seen += 1
        if self.n_seen == self.n:
            self.where = f"step {self.n}, {frame.f_code.co_filename}: {frame.f_code.co_name}"
            sys.setprofile(None)  # the clean-up runs at full speed
            raise Interrupt

    def run(self, call: Callable[[nn.Module], object], net: nn.Module) -> None:
        sys.setprofile(self)
        try:
            call(net)
        except Interrupt:
            pass
        finally:
            sys.setprofile(None)


@pytest.mark.parametrize("verb", VERBS)
def test_a_failure_at_any_step_leaves_the_model_as_it_was(verb: str) -> None:
    counter = InterruptAt(0)
    counter.run(VERBS[verb], pruned())
    assert counter.n_seen > N_FAILURES
    teacher = look(TEACHER)
    for i in range(N_FAILURES):
        net, at = pruned(), InterruptAt(1 + i * (counter.n_seen - 1) // (N_FAILURES - 1))
        before = look(net)
        at.run(VERBS[verb], net)
        assert at.where
        assert look(net) == before, at.where
    assert look(TEACHER) == teacher

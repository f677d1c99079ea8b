"""A load that fails, wherever and of whatever, leaves the model as it was: modules, tensors, contents, hooks."""

import dataclasses
import inspect
import itertools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparsify
from sparsify import CheckpointError
from sparsify.conversion import transaction


class Attention(nn.MultiheadAttention):
    """A subclass without anything of its own; convert leaves it all the same."""


class Loader(nn.Module):
    """A module with its own way to load, that fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.fails = False

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.cache.fill_(7)
        if self.fails:
            raise RuntimeError("from the module's own loading")


class Net(nn.Module):
    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.attention, self.last = (
            nn.Linear(8, 8),
            nn.MultiheadAttention(8, 2),
            nn.MultiheadAttention(8, 2),
        )
        self.own, self.norm, self.relu = Loader(), nn.BatchNorm1d(8), nn.ReLU()
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = nn.Parameter(self.head.weight.detach())
        self.embedding = nn.Embedding(8, 8)
        self.embedding.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.first(x)))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with everything in it: masked and exported layers, attentions, tied weights, a choice made elsewhere."""
    made = tmp_path_factory.mktemp("saved") / "model"
    model = sparsify.prune(sparsify.convert(Net(0).eval(), tied="share"), 0.5)
    model.first = sparsify.export(nn.Sequential(model.first), format="csr")[0]
    choice = dataclasses.replace(model.first.choice, times_us={"csr": 1.0}, machine="another machine")
    model.first.choice = choice
    sparsify.save(model, made)
    return made


def state(model: nn.Module) -> list[object]:
    """Everything that a load could have changed."""
    modules = [(name, id(m), type(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules()]
    tensors = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    return [modules, [(n, id(t), t.requires_grad, t.device, None if t.is_meta else t.tolist()) for n, t in tensors]]


def refused(path: Path, model: nn.Module, error: type[BaseException], words: str) -> None:
    before = state(model)
    with pytest.raises(error, match=words):
        sparsify.load(path, model)
    assert state(model) == before


def own_forward(model: Net) -> None:
    model.last.forward = lambda *_: None


def expand(model: Net) -> None:
    model.norm.bias = nn.Parameter(torch.zeros(1).expand(8))


def in_inference_mode(model: Net) -> None:
    with torch.inference_mode():
        model.norm.running_mean = torch.zeros(8)


def in_a_mapped_file(model: Net) -> None:
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
    model.norm.running_var = torch.from_numpy(np.frombuffer(memory, np.float32, 8))


#: What is odd about a model, the error, and words in it.
ODD: dict[str, tuple[Callable[[Net], object], type[BaseException], str]] = {
    "a subclass": (lambda m: setattr(m, "last", Attention(8, 2)), CheckpointError, "layers in last, .* Attention"),
    "a forward of its own": (own_forward, CheckpointError, "layers in last, .* forward was replaced"),
    "expanded": (expand, CheckpointError, r"norm\.bias cannot be written: it is expanded"),
    "inference mode": (in_inference_mode, CheckpointError, r"norm\.running_mean cannot be written: it was made inside"),
    "read-only": (in_a_mapped_file, CheckpointError, r"norm\.running_var cannot be written: its memory is read-only"),
    "its own loading": (lambda m: setattr(m.own, "fails", True), RuntimeError, "the module's own loading"),
    "a hook before": (lambda m: m.register_load_state_dict_pre_hook(lambda *_: 1 / 0), ZeroDivisionError, "division"),
    "a hook after": (
        lambda m: m.norm.register_load_state_dict_post_hook(lambda *_: 1 / 0),
        ZeroDivisionError,
        "division",
    ),
    "a hook of the state": (lambda m: m.register_state_dict_post_hook(lambda *_: 1 / 0), ZeroDivisionError, "division"),
    "no oddness but a warning": (lambda m: None, sparsify.MeasuredElsewhereWarning, "another machine"),
}


@pytest.mark.filterwarnings("error::sparsify.MeasuredElsewhereWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("name", ODD)
def test_a_model_that_cannot_be_loaded_onto_is_as_it_was(path: Path, name: str) -> None:
    make_odd, error, words = ODD[name]
    model = Net()
    make_odd(model)
    refused(path, model, error, words)


def test_an_unknown_kernel(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("SPARSIFY_KERNEL=nonsense")

    monkeypatch.setattr("sparsify.checkpoint.saved_layers.form_for", fail)
    refused(path, Net(), ValueError, "nonsense")


class Stop(BaseException):
    pass


def load_and_stop(path: Path, model: nn.Module, at: int) -> bool:
    """Load, and raise in the `at`-th call of a function of ours or of nn.Module; return whether that call came."""
    ours = (str(Path(sparsify.__file__).parent), nn.Module.register_buffer.__code__.co_filename)
    count = itertools.count()

    def watch(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ours) or code.co_filename == transaction.__file__:
            return
        if not code.co_flags & inspect.CO_GENERATOR and next(count) == at:  # a generator is also called to be closed
            raise Stop

    sys.setprofile(watch)
    try:
        sparsify.load(path, model)
    except Stop:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.filterwarnings("ignore::sparsify.MeasuredElsewhereWarning")
@pytest.mark.parametrize("own", [True, False])
def test_a_load_that_is_interrupted_at_any_step(path: Path, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """With a module that loads in its own way, and with torch's alone."""
    if not own:
        monkeypatch.delattr(Loader, "_load_from_state_dict")
    model = Net()
    before = state(model)
    step, at = 41, 0
    while load_and_stop(path, model, at):
        assert state(model) == before, at
        at += step
    assert at > 20 * step
    assert isinstance(model.first, sparsify.CSRLinear)
    assert model.own.cache.tolist() == ([7, 7] if own else [0, 0])


@pytest.mark.filterwarnings("ignore::sparsify.MeasuredElsewhereWarning")
def test_what_is_loaded_in_inference_mode_can_be_trained(path: Path) -> None:
    model = Net()
    with torch.inference_mode():
        sparsify.load(path, model)
    assert not any(tensor.is_inference() for tensor in itertools.chain(model.parameters(), model.buffers()))


@pytest.mark.filterwarnings("ignore::sparsify.MeasuredElsewhereWarning")
def test_memory_that_may_be_written_is_no_obstacle(path: Path) -> None:
    model = Net()
    model.norm.running_mean = torch.from_numpy(np.ones(8, np.float32))
    sparsify.load(path, model)
    assert model.norm.running_mean.tolist() == [0.0] * 8

"""Files and models without a match are refused by name, before the model is touched or a file written."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from saved_models import Net, assert_refused, saved
from torch import nn

import sparsify
from sparsify import CheckpointError
from sparsify.checkpoint import container


def test_a_meta_model_with_a_buffer_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        fresh = Net()
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="scratch"):
        sparsify.load(path, fresh)
    assert all(t.is_meta for t in fresh.state_dict().values())
    assert type(fresh.fc1) is nn.Linear


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    path = saved(tmp_path)

    def changed(change: Callable[[Net], object]) -> nn.Module:
        model = Net(seed=9)
        change(model)
        return model

    cases = {
        "'fc1', the model has none of that name": changed(lambda m: m.__delattr__("fc1")),
        "the model has a ReLU there": changed(lambda m: setattr(m, "fc1", nn.ReLU())),
        r"fc1 is \(20, 8\) in the file, \(21, 8\) in the model": changed(lambda m: setattr(m, "fc1", nn.Linear(8, 21))),
        r"lacks 1 .*'extra'": changed(lambda m: m.register_parameter("extra", nn.Parameter(torch.zeros(1)))),
        r"too many \['scale'\]": changed(lambda m: m.__delattr__("scale")),
        r"fc2.bias": changed(lambda m: setattr(m, "fc2", nn.Linear(20, 5))),
        r"conv.weight is \(8, 3, 1\) in the file, \(8, 3, 2\)": changed(
            lambda m: setattr(m, "conv", nn.Conv1d(3, 8, 2))
        ),
        "another architecture": nn.Linear(8, 20),
    }
    for message, model in cases.items():
        assert_refused(path, model, message)


def test_another_dtype(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert_refused(path, Net(seed=9).bfloat16(), r"float32 in the file, torch.bfloat16 in the model")
    model = Net(seed=9)
    model.conv.half()
    assert_refused(path, model, "conv.weight is torch.float32 in the file, torch.float16")


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    model = Net(seed=9)
    plain, pickled, empty, text = (tmp_path / name for name in ("plain.safetensors", "model.pt", "empty", "text"))
    safetensors.torch.save_file(dict(model.state_dict()), plain)
    torch.save(model.state_dict(), pickled)
    empty.touch()
    text.write_text("hello " * 100)
    assert_refused(plain, model, "not one written by sparsify.save")
    for path in (pickled, empty, text):
        assert_refused(path, model, "not a whole safetensors file")
        with pytest.raises(CheckpointError):
            sparsify.inspect(path)


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    model, pipe = Net(), tmp_path / "pipe"
    os.mkfifo(pipe)
    for call in (lambda path: sparsify.load(path, model), sparsify.inspect):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            call(tmp_path / "nowhere")
        with pytest.raises(IsADirectoryError, match="folder"):
            call(tmp_path)
        with pytest.raises(OSError, match="pipe"):  # which would wait forever
            call(pipe)


def test_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, tmp_path / "evil.safetensors")
    assert_refused(tmp_path / "evil.safetensors", Net(), "not a whole safetensors file")
    assert not (tmp_path / "ran").exists()


def test_a_header_cannot_swap_a_module_for_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="module"):
        container.LayerEntry(module="Embedding", format="csr", out_features=1, in_features=1)  # type: ignore[arg-type]


def test_state_that_cannot_be_saved(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None: ...

    with pytest.raises(ValueError, match="tensors only, got dict"):
        saved(tmp_path, nn.Sequential(Extra(2, 2)))
    with pytest.raises(ValueError, match="meta device"):
        saved(tmp_path, nn.Conv1d(1, 1, 1, device="meta"))
    with pytest.raises(ValueError, match="a file cannot hold"):
        saved(tmp_path, nn.ParameterList([torch.zeros(2, dtype=torch.complex64)]))
    assert list(tmp_path.iterdir()) == []

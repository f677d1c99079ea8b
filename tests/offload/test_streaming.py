"""A model pruned from disk, block by block, comes out as the same model pruned in memory; stopped and resumed too."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sparsify
from sparsify.checkpoint.tensor_file import TensorFile
from sparsify.conversion.convert import sparse_layers
from sparsify.errors import CheckpointError
from sparsify.masking.spec import LayerSpec, PruningSpec, layer_specs
from sparsify.offload.disk_offload import DiskOffload, largest_block_bytes, parameters_on_meta
from sparsify.offload.journal import Journal
from sparsify.offload.lazy_safetensors import LazySafetensors
from sparsify.offload.streaming import prune_from_disk, write_from_disk
from sparsify.pruning.reconstruct import Reconstruction
from sparsify.reporting.report import Report

WIDTH, N_BLOCKS = 32, 6
BATCHES = [{"ids": torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(i))} for i in range(3)]


class Block(nn.Module):
    """Norm, two layers that share an input, a third; and a frequency that is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.left, self.right = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, *, turn: Tensor) -> Tensor:
        y = self.norm(x) * turn
        return x + self.out(torch.sigmoid(self.left(y)) * self.right(y))


class Small(nn.Module):
    """A language model with a tied head, a rotary buffer that is in no file, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(N_BLOCKS))
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("turn", torch.linspace(0.5, 1.5, WIDTH), persistent=False)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = block(x, turn=self.turn)
        return self.head(x)


def made() -> Small:
    torch.manual_seed(0)
    model = Small().eval()
    model.scale.fill_(2.0)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model's weights in two files with an index; the tied head is there once."""
    state = {name: tensor.detach().clone() for name, tensor in made().state_dict().items() if name != "head.weight"}
    names = sorted(state)
    parts = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    folder = tmp_path / "weights"
    folder.mkdir()
    for file, inside in parts.items():
        save_file({name: state[name] for name in inside}, folder / file)
    where = {name: file for file, inside in parts.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def empty() -> nn.Module:
    with parameters_on_meta():
        model = Small().eval()
    return sparsify.convert(model, include="blocks.*")


def tasks_for(model: nn.Module) -> dict[str, LayerSpec]:
    shapes = {name: layer.shape for name, layer in sparse_layers(model).items()}
    return layer_specs(PruningSpec(0.5, "sparsegpt"), shapes)


def from_disk(folder: Path, out: Path, quantize: str | None = None, **options: Any) -> Report:
    model = empty()
    journal = Journal(out.with_suffix(".partial"), {"sparsity": "0.5"})
    prune_from_disk(model, LazySafetensors(folder), tasks_for(model), BATCHES, journal, **options)
    example = BATCHES[0] if quantize else None
    return write_from_disk(
        model, LazySafetensors(folder), journal, out, format="csr", quantize=quantize, example=example
    )


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_file_is_that_of_the_model_in_memory(folder: Path, tmp_path: Path, quantize: str | None) -> None:
    model = sparsify.convert(made(), include="blocks.*")
    sparsify.prune(model, 0.5, method="sparsegpt", data=BATCHES)
    example = BATCHES[0] if quantize else None
    expected = sparsify.export(model, format="csr", quantize=quantize, example=example)
    report = from_disk(folder, tmp_path / "out.safetensors", quantize, cache_bytes=0)
    loaded = sparsify.load(tmp_path / "out.safetensors", Small().eval())
    assert {row.name: row.sparsity for row in report} == dict.fromkeys(sparse_layers(model), 0.5)
    assert all(row.error and row.error > 0 for row in report)
    errors = {row.name: row.int8_error for row in sparsify.report(expected)}
    assert {row.name: row.int8_error for row in report} == {row.name: errors[row.name] for row in report}
    assert {row.numbers for row in report} == {"int8 weights" if quantize else "float32"}
    with torch.no_grad():
        assert torch.equal(loaded(**BATCHES[0]), expected(**BATCHES[0]))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_state_is_listed_once_whatever_the_number_of_tensors(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_lists = 0
    state_dict = Small.state_dict

    def counted(self: Small, *args: Any, **options: Any) -> Any:
        nonlocal n_lists
        n_lists += 1
        return state_dict(self, *args, **options)

    monkeypatch.setattr(Small, "state_dict", counted)
    from_disk(folder, tmp_path / "out.safetensors")
    assert n_lists == 1


def test_only_a_block_is_in_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DiskOffload] = []
    fetch = DiskOffload.fetch
    held: list[int] = []

    def watched(self: DiskOffload, module: nn.Module) -> None:
        fetch(self, module)
        seen.append(self)
        tensors = [*self.model.parameters(), *(b for m in self.model.modules() for b in m.buffers(recurse=False))]
        held.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))

    monkeypatch.setattr(DiskOffload, "fetch", watched)
    from_disk(folder, tmp_path / "out.safetensors")
    bound = largest_block_bytes(empty())
    whole = sum(p.numel() * p.element_size() for p in made().parameters())
    assert seen[-1].peak_bytes <= bound < whole / 4
    assert max(held) <= bound + 2000  # and the buffers, and one value for each tensor that is not there


class Stopped(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("n_finished", [1, 7, 3 * N_BLOCKS])
def test_resumed_where_it_stopped_the_file_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_finished: int
) -> None:
    from_disk(folder, tmp_path / "whole.safetensors")
    write, written = Journal.write, list[str]()

    def stopping(self: Journal, layers: dict[str, Any]) -> None:
        if len(written) == n_finished:
            raise Stopped
        written.extend(layers)
        write(self, layers)

    monkeypatch.setattr(Journal, "write", stopping)
    if n_finished < 3 * N_BLOCKS:
        with pytest.raises(Stopped):
            from_disk(folder, tmp_path / "out.safetensors")
    else:
        from_disk(folder, tmp_path / "out.safetensors")
    assert len(written) == n_finished
    again: list[str] = []
    monkeypatch.setattr(Journal, "write", lambda self, layers: (again.extend(layers), write(self, layers)))
    from_disk(folder, tmp_path / "out.safetensors")
    assert not set(again) & set(written)
    assert len(again) + len(written) == 3 * N_BLOCKS
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_what_is_not_this_models_file_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(state: Mapping[str, Tensor], message: str) -> None:
        save_file(dict(state), tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=message):
            DiskOffload(empty(), LazySafetensors(tmp_path / "odd.safetensors"), Journal(tmp_path / "run", {}), 0)

    state = {name: tensor.clone() for name, tensor in made().state_dict().items() if name != "head.weight"}
    refused({**state, "more": torch.ones(1)}, "1 tensors are too many")
    refused({**state, "blocks.0.out.weight": torch.ones(2, 2)}, r"blocks.0.out.weight is \(2, 2\) in the file")
    refused({name: tensor for name, tensor in state.items() if name != "blocks.0.out.weight"}, "lacks 1")
    with pytest.raises(FileNotFoundError, match="there is no weights file"):
        LazySafetensors(tmp_path / "nowhere")


def test_models_are_built_without_memory_in_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    register = nn.Module.register_parameter

    def in_a_thread(build: Callable[[], nn.Module]) -> nn.Module:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(build).result()

    first, second = parameters_on_meta(), parameters_on_meta()
    first.__enter__()
    assert nn.Linear(2, 2).weight.is_meta
    assert not in_a_thread(lambda: nn.Linear(2, 2)).weight.is_meta
    second.__enter__()
    first.__exit__(None, None, None)  # as two threads may end it, in any order
    assert nn.Linear(2, 2).weight.is_meta
    second.__exit__(None, None, None)
    assert not nn.Linear(2, 2).weight.is_meta
    assert nn.Module.register_parameter is register
    with contextlib.suppress(Stopped), parameters_on_meta():
        raise Stopped
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_parameter_of_two_places_is_one_without_memory_too() -> None:
    with parameters_on_meta():
        shared = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        one.weight, other.weight = shared, shared
        alone = nn.Linear(2, 2)
    assert one.weight is other.weight
    assert one.weight.is_meta
    assert not one.weight.requires_grad
    assert alone.weight is not one.weight


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model-1.safetensors", folder / "model-3.safetensors")
    LazySafetensors(folder)  # the index does not name it
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"is in two files, .*model-1.safetensors and .*model-3.safetensors; take one"):
        LazySafetensors(folder)


def test_what_cannot_be_read_leaves_the_model_as_it_was(folder: Path) -> None:
    model = empty()
    resident = DiskOffload(model, LazySafetensors(folder), None, 10**9)
    layer = model.blocks[0].left
    file = next(file for file in folder.glob("*.safetensors") if "blocks.0.left.weight" in TensorFile(file))
    os.truncate(file, 100)
    before = layer.weight.untyped_storage().nbytes(), layer.mask.untyped_storage().nbytes(), resident.n_bytes
    with pytest.raises(CheckpointError, match="another program changed it"):
        resident.fetch(layer)
    assert (layer.weight.untyped_storage().nbytes(), layer.mask.untyped_storage().nbytes(), resident.n_bytes) == before


def test_a_run_that_looks_at_dense_outputs_resumes_to_the_same_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Of finished blocks the dense weights are needed once more; a tuned block is finished as a whole."""

    def run(out: Path) -> None:
        model = empty()
        shapes = {name: layer.shape for name, layer in sparse_layers(model).items()}
        specs = layer_specs(PruningSpec(0.5, "sparsegpt", correct=True), shapes)
        journal, weights = Journal(out.with_suffix(".partial"), {}), LazySafetensors(folder)
        prune_from_disk(model, weights, specs, BATCHES, journal, reconstruct=Reconstruction(2), cache_bytes=0)
        write_from_disk(model, weights, journal, out, format="csr")

    run(tmp_path / "whole.safetensors")
    write, written = Journal.write, list[list[str]]()

    def stopping(self: Journal, layers: dict[str, Any]) -> None:
        if len(written) == 2:
            raise Stopped
        written.append(list(layers))
        write(self, layers)

    monkeypatch.setattr(Journal, "write", stopping)
    with pytest.raises(Stopped):
        run(tmp_path / "out.safetensors")
    assert written == [[f"blocks.{i}.{name}" for name in ("left", "right", "out")] for i in range(2)]
    monkeypatch.setattr(Journal, "write", write)
    run(tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    model = sparsify.convert(made(), include="blocks.*")
    sparsify.prune(model, 0.5, method="sparsegpt", correct=True, data=BATCHES, reconstruct=2)
    loaded = sparsify.load(tmp_path / "out.safetensors", Small().eval())
    with torch.no_grad():
        assert torch.equal(loaded(**BATCHES[0]), sparsify.export(model, format="csr")(**BATCHES[0]))

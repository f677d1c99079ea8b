"""save, load, inspect: what comes back is what went in; what does not fit is refused before the model is touched."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cases import SHAPES, masks, repeatable, weight
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsify
from sparsify import CheckpointError, CSRLinear, SparseLinear
from sparsify.checkpoint import container

DATA = Path(__file__).parents[1] / "data"


class Net(nn.Module):
    """A bit of everything: two Linears, one without bias, a norm with buffers, a conv, an attention."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv1d(3, 8, 1)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1 = nn.Linear(8, 20)
        self.fc2 = nn.Linear(20, 5, bias=False)
        self.register_buffer("scale", torch.tensor(0.5 + seed))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.fc2(torch.relu(self.fc1(x))) * self.scale


def masked(seed: int = 0, sparsity: float = 0.7) -> nn.Module:
    model = sparsify.convert(Net(seed), include=["fc1", "fc2"])
    return sparsify.prune(model, sparsity).eval()


def saved(tmp_path: Path, model: nn.Module | None = None) -> Path:
    path = tmp_path / "model.safetensors"
    sparsify.save(sparsify.export(masked(), format="csr") if model is None else model, path)
    return path


def states(model: nn.Module) -> dict[str, tuple[type, object]]:
    """Return everything that a failed load could have changed: types, identities and a copy of the values."""
    values = {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    return {"modules": modules, "values": values, "training": {n: m.training for n, m in model.named_modules()}}


def assert_untouched(model: nn.Module, before: dict) -> None:
    now = states(model)
    assert now["modules"] == before["modules"]
    assert now["training"] == before["training"]
    assert now["values"].keys() == before["values"].keys()
    for name, (identity, value) in now["values"].items():
        assert identity == before["values"][name][0], name
        assert torch.equal(value, before["values"][name][1]), name


def assert_refused(path: Path, model: nn.Module, message: str) -> None:
    before = states(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        sparsify.load(path, model)
    assert str(path) in str(caught.value)
    assert_untouched(model, before)


# What comes back


@pytest.mark.parametrize("format", ["csr", "dense", "auto"])
def test_an_exported_model_gives_the_same_outputs_after_load(tmp_path: Path, format: str) -> None:
    fast = sparsify.export(masked(), format=format).eval()
    x = torch.randn(4, 3, 6)
    path = saved(tmp_path, fast)
    fresh = Net(seed=9).eval()
    loaded = sparsify.load(path, fresh)
    assert loaded is fresh
    assert torch.equal(loaded(x), fast(x))
    for name in ("fc1", "fc2"):
        assert type(loaded.get_submodule(name)) is type(fast.get_submodule(name))
        assert loaded.get_submodule(name).weight.dtype == torch.float32


def test_a_masked_model_comes_back_masked_and_trainable(tmp_path: Path) -> None:
    model = masked()
    with torch.no_grad():
        row, column = model.fc1.mask.nonzero()[0].tolist()
        model.fc1.weight[row, column] = 0.0  # kept, and zero: the mask decides
    loaded = sparsify.load(saved(tmp_path, model), Net(seed=9)).train()
    assert isinstance(loaded.fc1, SparseLinear)
    assert torch.equal(loaded.fc1.mask, model.fc1.mask)
    assert torch.equal(loaded.fc1.weight, model.fc1.weight)
    loaded(torch.randn(4, 3, 6)).sum().backward()
    assert loaded.fc1.weight.grad is not None
    assert not loaded.fc1.weight.grad[~loaded.fc1.mask].any()


def test_tensors_come_in_the_order_of_the_header(tmp_path: Path) -> None:
    """What is put together from files that were read is then the same, byte for byte, in every process."""
    model = sparsify.convert(nn.Sequential(*(nn.Linear(2, 2) for _ in range(20))))
    sparsify.save(sparsify.prune(model, 0.5), tmp_path / "a.safetensors")
    header, tensors = container.read(tmp_path / "a.safetensors")
    assert list(tensors) == list(header.tensors)
    assert len(tensors) > 20


def test_what_an_optimizer_left_in_masked_weights_is_not_saved(tmp_path: Path) -> None:
    model = masked()
    with torch.no_grad():
        model.fc1.weight.add_(1.0)
    assert (model.fc1.weight[~model.fc1.mask] != 0).all()
    loaded = sparsify.load(saved(tmp_path, model), Net(seed=9))
    assert not loaded.fc1.weight[~loaded.fc1.mask].any()
    assert torch.equal(loaded.fc1.masked_weight(), model.fc1.masked_weight())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = masked().to(dtype)
    loaded = sparsify.load(saved(tmp_path, model), Net(seed=9).to(dtype))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert loaded.state_dict()[name].dtype == value.dtype


@given(
    shape=st.sampled_from(SHAPES),
    mask=st.sampled_from(["all", "none", "empty row", "empty column", "half"]),
    zeros=st.booleans(),
    packed=st.booleans(),
)
@repeatable
def test_any_layer_round_trips(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], mask: str, zeros: bool, packed: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / "layer.safetensors"
    linear = nn.Linear(shape[1], shape[0])
    linear.weight = nn.Parameter(weight(shape) * (0.0 if zeros else 1.0))  # 0.0 and -0.0
    layer = SparseLinear.from_linear(linear, masks(shape)[mask])
    saved = sparsify.export(layer, format="csr") if packed else layer
    sparsify.save(saved, path)
    loaded = sparsify.load(path, nn.Linear(shape[1], shape[0]))
    assert type(loaded) is type(saved)
    found = loaded.to_sparse() if isinstance(loaded, CSRLinear) else loaded
    assert torch.equal(found.mask, layer.mask)
    assert torch.equal(found.weight.view(torch.int32), layer.weight.view(torch.int32))
    assert torch.equal(found.bias, layer.bias)


def test_the_smallest_format_is_chosen(tmp_path: Path) -> None:
    def formats(sparsity: float) -> set[str]:
        model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(200, 100))), sparsity)
        rows = sparsify.inspect(saved(tmp_path, model))
        assert [row.n_bytes for row in rows] == [min(sizes(100, 200, sparsity).values())]
        return {row.format for row in rows}

    def sizes(out: int, inner: int, sparsity: float) -> dict[str, int]:
        kept = out * inner - round(sparsity * out * inner)
        return {"csr": 4 * (out + 1) + 5 * kept, "bitmask": out * inner // 8 + 4 * kept, "dense": 4 * out * inner}

    for sparsity in (0.0, 0.01, 0.5, 0.87, 0.9, 0.99, 1.0):
        assert formats(sparsity) == {min(sizes(100, 200, sparsity), key=sizes(100, 200, sparsity).__getitem__)}
    assert [formats(s) for s in (0.0, 0.5, 0.99)] == [{"dense"}, {"bitmask"}, {"csr"}]


def test_a_dense_linear_with_zeros_is_packed_and_stays_a_linear(tmp_path: Path) -> None:
    model = sparsify.to_dense(masked())
    path = saved(tmp_path, model)
    assert [(row.name, row.format) for row in sparsify.inspect(path)] == [("fc1", "bitmask"), ("fc2", "bitmask")]
    loaded = sparsify.load(path, Net(seed=9))
    assert type(loaded.fc1) is nn.Linear
    assert torch.equal(loaded.fc1.weight, model.fc1.weight)


def test_negative_zeros_in_a_plain_linear_keep_their_sign(tmp_path: Path) -> None:
    linear = nn.Linear(40, 40, bias=False)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(40, 40) < 0.1).abs_()[0] = -0.0
    model = nn.Sequential(linear)
    path = saved(tmp_path, model)
    assert [row.format for row in sparsify.inspect(path)] != ["dense"]
    loaded = sparsify.load(path, nn.Sequential(nn.Linear(40, 40, bias=False)))
    assert torch.equal(loaded[0].weight.view(torch.int32), linear.weight.view(torch.int32))


def test_a_root_that_is_a_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fast = sparsify.export(sparsify.prune(sparsify.convert(nn.Linear(30, 20)), 0.5), format="csr")
    loaded = sparsify.load(saved(tmp_path, fast), nn.Linear(30, 20))
    x = torch.randn(2, 30)
    assert isinstance(loaded, CSRLinear)
    assert torch.equal(loaded(x), fast(x))


def test_load_keeps_what_the_user_set_on_the_fresh_model(tmp_path: Path) -> None:
    path = saved(tmp_path)
    fresh = Net(seed=9).eval()
    calls = []
    fresh.fc1.register_forward_hook(lambda *_: calls.append(1))
    fresh.conv.weight.requires_grad_(False)
    conv, fc1 = fresh.conv.weight, fresh.fc1
    loaded = sparsify.load(path, fresh)
    loaded(torch.randn(4, 3, 6))
    assert calls == [1]
    assert loaded.conv.weight is conv
    assert not conv.requires_grad
    assert loaded.fc1 is fc1
    assert not loaded.fc1.training


def test_a_model_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    class Small(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 20), nn.BatchNorm1d(20), nn.Linear(20, 5))

    torch.manual_seed(0)
    fast = sparsify.export(sparsify.prune(sparsify.convert(Small()), 0.7), format="csr").eval()
    path = saved(tmp_path, fast)
    with torch.device("meta"):
        fresh = Small().eval()
    loaded = sparsify.load(path, fresh)
    assert not any(t.is_meta for t in loaded.state_dict().values())
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), fast(x))
    assert all(isinstance(p, nn.Parameter) for p in loaded.parameters())


def test_a_meta_model_with_a_buffer_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        fresh = Net()
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="scratch"):
        sparsify.load(path, fresh)
    assert all(t.is_meta for t in fresh.state_dict().values())
    assert type(fresh.fc1) is nn.Linear


class Tied(nn.Module):
    def __init__(self, seed: int = 0, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.fc, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.embedding(x)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path, device: str) -> None:
    fast = sparsify.export(sparsify.prune(sparsify.convert(Tied(), exclude="head"), 0.5), format="csr")
    path = saved(tmp_path, fast)
    assert set(safetensors.torch.load_file(path)) == {
        "fc.weight.bits",
        "fc.weight.values",
        "fc.bias",
        "embedding.weight",
    }
    with torch.device(device):
        fresh = Tied(seed=9)
    loaded = sparsify.load(path, fresh)
    assert loaded.head.weight is loaded.embedding.weight
    assert not loaded.head.weight.is_meta
    x = torch.arange(10)
    assert torch.equal(loaded(x), fast(x))


def test_tied_weights_fill_an_untied_model(tmp_path: Path) -> None:
    fast = sparsify.export(sparsify.prune(sparsify.convert(Tied(), exclude="head"), 0.5), format="csr")
    loaded = sparsify.load(saved(tmp_path, fast), Tied(seed=9, tied=False))
    assert loaded.head.weight is not loaded.embedding.weight
    assert torch.equal(loaded.head.weight, fast.embedding.weight)
    assert torch.equal(loaded(torch.arange(10)), fast(torch.arange(10)))


def test_untied_weights_do_not_fit_a_tied_model(tmp_path: Path) -> None:
    model = sparsify.prune(sparsify.convert(Tied(tied=False), exclude="head"), 0.5)
    path = saved(tmp_path, model)
    assert_refused(path, Tied(seed=9), "embedding.weight and head.weight are one tensor in the model")
    with torch.no_grad():
        model.head.weight.copy_(model.embedding.weight)  # equal values are no contradiction
    loaded = sparsify.load(saved(tmp_path, model), Tied(seed=9))
    assert torch.equal(loaded(torch.arange(10)), model(torch.arange(10)))


def test_shared_modules_stay_shared(tmp_path: Path) -> None:
    def build(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layer = nn.Linear(8, 8)
        return nn.Sequential(layer, nn.ReLU(), layer)

    fast = sparsify.export(sparsify.prune(sparsify.convert(build(0)), 0.5), format="csr")
    loaded = sparsify.load(saved(tmp_path, fast), build(9))
    assert loaded[0] is loaded[2]
    assert isinstance(loaded[0], CSRLinear)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), fast(x))


def test_tensors_that_overlap_in_memory_are_saved(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.fc, table = nn.Linear(8, 8), torch.randn(10)
            self.register_buffer("low", table[:6])
            self.register_buffer("high", table[4:])
            self.copy = nn.Parameter(self.fc.bias.data)  # another Parameter over the same memory

    model = sparsify.prune(sparsify.convert(Views(0)), 0.5)
    loaded = sparsify.load(saved(tmp_path, model), Views(9))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_saving_twice_gives_the_same_bytes_and_changes_nothing(tmp_path: Path) -> None:
    model = masked()
    before = states(model)
    first = saved(tmp_path, model).read_bytes()
    assert saved(tmp_path, model).read_bytes() == first
    assert_untouched(model, before)
    again = saved(tmp_path, sparsify.load(saved(tmp_path, model), Net(seed=9)))
    assert again.read_bytes() == first


def test_loading_does_not_keep_the_file_open_or_mapped(tmp_path: Path) -> None:
    path = saved(tmp_path)
    loaded = sparsify.load(path, Net(seed=9)).eval()
    x = torch.randn(4, 3, 6)
    before = loaded(x)
    path.write_bytes(b"\0" * path.stat().st_size)  # in place, under any mapping
    assert torch.equal(loaded(x), before)


def test_inspect_needs_no_model(tmp_path: Path) -> None:
    path = saved(tmp_path, sparsify.export(masked(), format="csr"))
    rows = sparsify.inspect(path)
    assert [(r.name, r.shape, r.dense_bytes) for r in rows] == [("fc1", (20, 8), 640), ("fc2", (5, 20), 400)]
    assert [round(row.sparsity, 12) for row in rows] == [0.7, 0.7]
    stored = safetensors.torch.load_file(path)
    for row in rows:
        parts = [t for name, t in stored.items() if name.startswith(f"{row.name}.weight")]
        assert row.n_bytes == sum(t.numel() * t.element_size() for t in parts)


# A file of version 1, written once, has to load forever.


def v1_model() -> nn.Module:
    """Build the model whose weights tests/data/v1.safetensors holds; every value is a formula."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.csr, self.bitmask, self.dense = nn.Linear(64, 3), nn.Linear(4, 9), nn.Linear(3, 2)
            self.masked, self.head = nn.Linear(5, 4, bias=False), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("count", torch.tensor(7))

    return Model()


def v1_weight(shape: tuple[int, int], every: int) -> tuple[Tensor, Tensor]:
    """Return weight and mask: weight k is k / 8 - 1, and every so many-th is kept."""
    k = torch.arange(shape[0] * shape[1]).reshape(shape)
    mask = k % every == 0
    return (k / 8 - 1) * mask, mask


V1_LAYERS = {"csr": ((3, 64), 50), "bitmask": ((9, 4), 2), "dense": ((2, 3), 1), "masked": ((4, 5), 3)}


def write_v1(path: Path) -> None:
    """Write the file anew; only for a new format version, beside the old file."""
    model = v1_model()
    with torch.no_grad():
        model.embedding.weight.copy_(torch.arange(24.0).reshape(6, 4))
        for name, (shape, every) in V1_LAYERS.items():
            model.get_submodule(name).weight.copy_(v1_weight(shape, every)[0])
            if model.get_submodule(name).bias is not None:
                model.get_submodule(name).bias.copy_(torch.arange(float(shape[0])))
    sparsify.convert(model, include=[*V1_LAYERS])
    for name, (shape, every) in V1_LAYERS.items():
        model.get_submodule(name).set_mask(v1_weight(shape, every)[1])
    for name in ("csr", "bitmask", "dense"):
        setattr(model, name, CSRLinear.from_sparse(model.get_submodule(name)))
    sparsify.save(model, path)


def test_the_file_of_version_1_loads() -> None:
    path = DATA / "v1.safetensors"
    assert path.stat().st_size < 4096
    assert {row.name: row.format for row in sparsify.inspect(path)} == {
        "csr": "csr",
        "bitmask": "bitmask",
        "dense": "dense",
        "masked": "bitmask",
    }
    model = sparsify.load(path, v1_model())
    for name, (shape, every) in V1_LAYERS.items():
        wanted, mask = v1_weight(shape, every)
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear if name == "masked" else CSRLinear)
        sparse = layer.to_sparse() if isinstance(layer, CSRLinear) else layer
        assert torch.equal(sparse.weight, wanted), name
        assert torch.equal(sparse.mask, mask), name
        if name != "masked":
            assert torch.equal(layer.bias, torch.arange(float(shape[0])))
    assert torch.equal(model.embedding.weight, torch.arange(24.0).reshape(6, 4))
    assert model.head.weight is model.embedding.weight
    assert int(model.count) == 7


# What does not fit


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


# What cannot be saved


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


# Writing is all or nothing


def folder(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "sparsify.checkpoint.container._safetensors_header"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, error: BaseException
) -> None:
    saved(tmp_path)
    before = folder(tmp_path)

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(broken, fail)
    with pytest.raises(type(error)):
        saved(tmp_path, sparsify.export(masked(seed=3), format="csr"))
    assert folder(tmp_path) == before


FULL_DISK = """
import resource, sys, sparsify
from torch import nn
model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(100, 100))), 0.5)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    sparsify.save(model, sys.argv[1])
except OSError as error:
    print("OSError", error.errno)
"""


def test_a_disk_that_fills_up_is_an_os_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = folder(tmp_path)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", str(errno.EFBIG)], done.stderr
    assert folder(tmp_path) == before


def test_a_refused_model_leaves_the_old_file(tmp_path: Path) -> None:
    saved(tmp_path)
    before = folder(tmp_path)
    with pytest.raises(ValueError, match="meta"):
        saved(tmp_path, nn.Conv1d(1, 1, 1, device="meta"))
    assert folder(tmp_path) == before


WRITER = """
import sys, torch, sparsify
from torch import nn
torch.manual_seed(0)
model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(1024, 1024))), 0.5)
print("ready", flush=True)
while True:
    sparsify.save(model, sys.argv[1])
    print("saved", flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(1)
    old = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(1024, 1024))), 0.5)
    sparsify.save(old, path)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30  # wait for the temporary file: the writer is in the middle of it
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            pass
        writer.send_signal(signal.SIGKILL)
    sparsify.load(path, nn.Sequential(nn.Linear(1024, 1024)))  # old or new, but whole
    leftovers = [found.name for found in tmp_path.iterdir() if found != path]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in leftovers)
    sparsify.save(old, path)  # and leftovers are in nobody's way
    sparsify.load(path, nn.Sequential(nn.Linear(1024, 1024)))


def test_save_into_a_missing_folder_or_onto_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        sparsify.save(masked(), tmp_path / "nowhere" / "model.safetensors")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        sparsify.save(masked(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_save_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    sparsify.save(masked(), link)
    assert link.is_symlink()
    sparsify.load(target, Net(seed=9))


def test_save_onto_a_pipe_is_refused_as_load_refuses_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"cannot save to .*pipe: it is a pipe"):
        sparsify.save(masked(), tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_new_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    mode = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert stat.S_IMODE(saved(tmp_path).stat().st_mode) == mode


def test_the_header_is_json_that_anyone_can_read(tmp_path: Path) -> None:
    path = saved(tmp_path, sparsify.export(masked(), format="csr"))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    header = json.loads(metadata["sparsify"])
    assert header["version"] == 1
    assert set(header["tensors"]) == names
    assert {name: entry["module"] for name, entry in header["layers"].items()} == {
        "fc1": "CSRLinear",
        "fc2": "CSRLinear",
    }
    assert header["aliases"] == {}

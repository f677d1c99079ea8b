"""save, load, inspect: the loaded model is the saved one, bit for bit, whatever its layers, dtypes and device."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cases import SHAPES, masks, repeatable, weight
from hypothesis import given
from hypothesis import strategies as st
from saved_models import Net, assert_untouched, masked, saved, states
from torch import nn

import sparsify
from sparsify import CSRLinear, SparseLinear
from sparsify.checkpoint import container


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
    """A file put together from files read earlier is then the same, byte for byte, in every process."""
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

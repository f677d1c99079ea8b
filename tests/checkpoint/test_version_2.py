"""Files with int8 values: a file of version 2, written once, loads forever; what a wrong one is refused for."""

import copy
from pathlib import Path

import forged_files as forged
import pytest
import torch
from forged_files import File
from test_version_1 import V1_LAYERS, v1_model, v1_weight
from torch import Tensor, nn

import sparsify
from sparsify import CheckpointError, CSRLinear

DATA = Path(__file__).parents[1] / "data"
LAYERS = {name: V1_LAYERS[name] for name in ("csr", "bitmask", "dense")}


def rounded(shape: tuple[int, int], every: int) -> Tensor:
    """Return the weight of version 1's file, rounded as docs/formats.md says."""
    weight, _ = v1_weight(shape, every)
    largest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale).round() * scale


def write_v2(path: Path) -> None:
    """Write the file anew; only for a new format version, beside the old file."""
    model = sparsify.load(DATA / "v1.safetensors", v1_model())
    for name in LAYERS:
        setattr(model, name, CSRLinear.from_sparse(model.get_submodule(name).to_sparse(), quantized=True))
    sparsify.save(model, path)


def test_the_file_of_version_2_loads() -> None:
    path = DATA / "v2.safetensors"
    assert path.stat().st_size < 4096
    assert {row.name: (row.format, row.numbers) for row in sparsify.inspect(path)} == {
        "csr": ("csr", "int8 weights"),
        "bitmask": ("bitmask", "int8 weights"),
        "dense": ("dense", "int8 weights"),
        "masked": ("bitmask", "float32"),
    }
    model = sparsify.load(path, v1_model())
    for name, (shape, every) in LAYERS.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, CSRLinear)
        assert (layer.values.dtype, layer.own_dtype) == (torch.int8, torch.float32)
        assert torch.equal(layer.weight + 0, rounded(shape, every)), name
        assert torch.equal(layer.bias, torch.arange(float(shape[0])))
        assert torch.equal(layer.to_sparse().mask, v1_weight(shape, every)[1])
    assert torch.equal(model.masked.weight, v1_weight(*V1_LAYERS["masked"])[0])
    assert model.head.weight is model.embedding.weight


def test_the_file_is_written_the_same_today(tmp_path: Path) -> None:
    write_v2(tmp_path / "v2.safetensors")
    assert (tmp_path / "v2.safetensors").read_bytes() == (DATA / "v2.safetensors").read_bytes()
    assert File((DATA / "v2.safetensors").read_bytes()).header["version"] == 2
    assert File((DATA / "v1.safetensors").read_bytes()).header["version"] == 1


def test_a_file_without_int8_values_is_of_version_1(tmp_path: Path) -> None:
    sparsify.save(sparsify.load(DATA / "v2.safetensors", v1_model()).masked, tmp_path / "float.safetensors")
    header = File((tmp_path / "float.safetensors").read_bytes()).header
    assert header["version"] == 1
    assert "dequantized" not in header["layers"][""]


def pruned(sparsity: float, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 20, bias=False)).to(dtype)
    return sparsify.prune(sparsify.convert(model), sparsity).eval()


def fresh(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 20, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, sparsity: float, dtype: torch.dtype) -> None:
    fast = sparsify.export(pruned(sparsity, dtype), format="csr", quantize="int8")
    sparsify.save(fast, tmp_path / "model.safetensors")
    back = sparsify.load(tmp_path / "model.safetensors", fresh(dtype))
    for name, tensor in fast.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert back[0].own_dtype == dtype
    x = torch.randn(3, 60).to(dtype)
    assert torch.equal(back(x), fast(x))
    sparsify.save(sparsify.to_dense(back), tmp_path / "dense.safetensors")
    dense = sparsify.load(tmp_path / "dense.safetensors", fresh(dtype))
    assert torch.equal(dense(x), fast(x))


def test_a_model_of_another_dtype_is_refused(tmp_path: Path) -> None:
    sparsify.save(sparsify.export(pruned(0.5), format="csr", quantize="int8"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"0 is torch.float32 in the file, torch.bfloat16 in the model"):
        sparsify.load(tmp_path / "model.safetensors", fresh(torch.bfloat16))


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.70), (0.7, 0.50), (0.8, 0.38), (0.9, 0.26)])
def test_bytes_of_a_weight_in_a_file(tmp_path: Path, sparsity: float, most: float) -> None:
    layer = sparsify.convert(nn.Sequential(nn.Linear(768, 768, bias=False)))
    sparsify.save(sparsify.export(sparsify.prune(layer, sparsity), format="csr", quantize="int8"), tmp_path / "x")
    assert sparsify.inspect(tmp_path / "x").total.n_bytes <= most * 768 * 768


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    model = sparsify.load(DATA / "v1.safetensors", v1_model())
    sparsify.convert(model, include="head", tied="share")
    fast = sparsify.export(sparsify.prune(model, 0.5), format="csr", quantize="int8")
    sparsify.save(fast, tmp_path / "tied.safetensors")
    assert "embedding.weight" in File((tmp_path / "tied.safetensors").read_bytes()).header["aliases"]
    back = sparsify.load(tmp_path / "tied.safetensors", v1_model())
    assert torch.equal(back.embedding.weight, fast.embedding.weight)
    assert torch.equal(back.head.values, fast.head.values)


SCALE, VALUES = "bitmask.weight.scale", "bitmask.weight.values"
NINE = (1.0,) * 8


def scales(*values: float) -> forged.Lie:
    return forged.tensor(SCALE, lambda *_: forged.f32(*values))


LIES: dict[str, tuple[forged.Lie, str]] = {
    "NaN": (scales(*NINE, float("nan")), "finite and greater than 0, got nan"),
    "Inf": (scales(*NINE, float("inf")), "got inf"),
    "zero": (scales(*NINE, 0.0), "got 0.0"),
    "negative": (scales(*NINE, -1.0), "got -1.0"),
    "subnormal": (scales(*NINE, 1e-40), "greater than 0"),
    "short": (scales(*NINE), r"float32 of shape \(9,\)"),
    "long": (scales(*NINE, 1.0, 1.0), r"float32 of shape \(9,\)"),
    "two dimensions": (forged.tensor(SCALE, lambda dtype, shape, raw: (dtype, [9, 1], raw)), "of shape"),
    "half the bits": (forged.tensor(SCALE, lambda dtype, shape, raw: ("F16", [18], raw)), "must be float32"),
    "missing": (forged.drop(SCALE), "is missing"),
    "-128": (forged.tensor(VALUES, lambda d, s, raw: (d, s, b"\x80" + raw[1:])), r"in \[-127, 127\], got -128"),
    "unsigned values": (forged.tensor(VALUES, lambda dtype, shape, raw: ("U8", shape, raw)), "belongs to int8"),
    "float values": (
        forged.tensor(VALUES, lambda dtype, shape, raw: ("F32", shape, raw * 4)),
        "belongs to int8 values",
    ),
    "no dtype": (
        forged.several(forged.entry("bitmask", dequantized=""), forged.drop(SCALE)),
        "bitmask: values must be floating",
    ),
    "odd dtype": (forged.entry("bitmask", dequantized="I8"), "header is wrong at layers.bitmask.dequantized"),
    "version 1": (forged.header("version", 1), "version 1 has no int8 values"),
    "version 0": (forged.header("version", 0), "there is no format version 0"),
    "version 3": (forged.header("version", 3), "reads up to 2"),
    "scale of floats": (forged.add("masked.weight.scale", forged.f32(1, 1, 1, 1)), "too many"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_file_is_refused_before_anything_changes(tmp_path: Path, lie: str) -> None:
    file = File((DATA / "v2.safetensors").read_bytes())
    change, message = LIES[lie]
    change(file)
    path = tmp_path / "lie.safetensors"
    path.write_bytes(file.bytes())
    model = v1_model()
    before = copy.deepcopy(forged.contents(model))
    with pytest.raises(CheckpointError, match=message):
        sparsify.load(path, model)
    assert forged.contents(model) == before
    if lie != "scale of floats":  # without a model, nobody knows that it is too many
        with pytest.raises(CheckpointError, match=message):
            sparsify.inspect(path)

"""The C reader of checkpoints beside Python's: the same files refused, and the same contents of all others."""

import random
import re
from pathlib import Path

import native_reader
import pytest
import safetensors.torch
import torch
from forged_files import File
from native_reader import Refused
from test_container_fuzz import damaged, random_lies
from test_lying_files import LIES, TABLES, TEXTS
from torch import Tensor, nn

import sparsify
from sparsify import CheckpointError, cli
from sparsify.checkpoint import container
from sparsify.checkpoint.weight_codec import StoredWeight, part_names
from sparsify.kernels.cpu import library

DATA = Path(__file__).resolve().parents[1] / "data"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not library.available(), reason=f"no native kernels: {library.why_missing()}"),
]


def same(found: Tensor, wanted: Tensor) -> bool:
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, wanted)]
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(*bits)


def compare(path: Path) -> str | None:
    """Return the reason for which the library refuses a file; assert that it holds the same as in Python otherwise."""
    try:
        contents = native_reader.read(path)
    except Refused as error:
        return str(error)
    header, tensors = container.read(path)
    sparsify.inspect(path)
    assert contents.tensors.keys() == tensors.keys()
    assert all(same(contents.tensors[name], tensor) for name, tensor in tensors.items())
    assert list(contents.layers) == list(header.layers)
    for name, entry in header.layers.items():
        found = contents.layers[name]
        assert (found.module, found.format, found.shape) == (entry.module, entry.format, entry.shape)
        assert found.dequantized == entry.dequantized
        assert found.form == (header.choices[name].form if name in header.choices else "")
        owner = re.sub(r"\.?weight$", "", header.aliases.get(f"{name}.weight".lstrip("."), f"{name}.weight"))
        stored = StoredWeight(entry, [tensors[part] for part in part_names(owner, entry)])
        if entry.module == "Embedding":
            assert same(found.values, stored.values.reshape(-1))
            continue
        for part, wanted in zip((found.crow, found.col, found.values), stored.csr, strict=True):
            assert same(part, wanted.to(part.dtype))
        assert (found.scale is None) == (stored.scale is None)
        assert stored.scale is None or same(found.scale, stored.scale)
    return None


def python_refuses(path: Path) -> bool:
    try:
        sparsify.inspect(path)
    except CheckpointError:
        return True
    return False


#: Of the files that Python takes: the library has no patience with these.
STRICTER = re.compile("a key stands twice|an escape that does not exist")


def check(path: Path, label: str) -> bool:
    """Return whether both take a file, after a check that they agree."""
    refused = compare(path)
    if refused is None:
        return True
    assert 0 < len(refused) < 400, label
    assert python_refuses(path) or STRICTER.search(refused), f"{label}: only the library refuses: {refused}"
    return False


@pytest.mark.parametrize("name", ["v1.safetensors", "v2.safetensors"])
def test_files_of_both_versions_are_read(name: str) -> None:
    assert compare(DATA / name) is None


def test_a_good_file_is_read(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(good)
    assert compare(path) is None
    with native_reader.opened(path) as handle:
        assert native_reader.find(handle, "layer", "bits") == list(container.read(path)[0].layers).index("bits")
        assert native_reader.find(handle, "layer", "nothing") == native_reader.NOT_FOUND
        tied, own = (native_reader.find(handle, "tensor", f"{name}.weight") for name in ("head", "embedding"))
        assert tied == own >= 0
        assert native_reader.find(handle, "tensor", "nothing") == native_reader.NOT_FOUND


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_features", [1, 256, 257, 65536, 65537])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
def test_every_format_and_dtype_is_read(dtype: torch.dtype, in_features: int, sparsity: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sparsify.convert(nn.Sequential(nn.Linear(in_features, 3)).to(dtype))
    model[0].sparse_update(sparsity)
    sparsify.save(model, tmp_path / "model.safetensors")
    assert compare(tmp_path / "model.safetensors") is None


def test_the_root_shared_weights_and_tables_of_int8_are_read(tmp_path: Path) -> None:
    root = sparsify.prune(sparsify.convert(nn.Linear(64, 8)), 0.75)
    model = nn.ModuleDict({"table": nn.Embedding(10, 6), "a": nn.Linear(6, 10, bias=False), "b": nn.Linear(6, 10)})
    model["b"].weight = model["a"].weight
    shared = sparsify.prune(sparsify.convert(model, tied="share"), 0.5)
    fast = sparsify.export(shared, format="auto", tokens=1, quantize="int8", quantize_rest=True)
    for number, saved in enumerate((root, sparsify.export(root, format="csr"), shared, fast)):
        path = tmp_path / f"{number}.safetensors"
        sparsify.save(saved, path)
        assert compare(path) is None


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_as_in_python(good: bytes, tmp_path: Path, name: str) -> None:
    file, path = File(good), tmp_path / "lie.safetensors"
    LIES[name][0](file)
    path.write_bytes(file.bytes())
    check(path, name)


def test_other_lies_are_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lie.safetensors"
    raws = [File(good).bytes(text=text) for text in TEXTS.values()]
    raws += [File(good).bytes(entries=change) for change in TABLES.values()]
    for number, raw in enumerate(raws):
        path.write_bytes(raw)
        assert not check(path, str(number))
    assert len(raws) > 30


def test_damaged_files_are_refused(good: bytes, tmp_path: Path) -> None:
    path, n_taken = tmp_path / "damaged.safetensors", 0
    for label, raw in damaged(good, 1500, seed=2):
        path.write_bytes(raw)
        n_taken += check(path, label)
    assert n_taken < 50


def test_random_lies_are_told_apart(good: bytes, tmp_path: Path) -> None:
    rng, path, n_taken = random.Random(3), tmp_path / "lie.safetensors", 0
    for number in range(700):
        file = File(good)
        random_lies(file, rng)
        path.write_bytes(file.bytes())
        n_taken += check(path, str(number))
    assert 20 < n_taken < 500


def test_what_is_no_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, plain)
    for path, reason in (
        (tmp_path / "nothing", "there is no such file"),
        (tmp_path, "there is no such file"),
        (Path("/dev/zero"), "there is no such file"),
        (plain, "not one written by sparsify.save"),
    ):
        with pytest.raises(Refused, match=reason):
            native_reader.read(path)
    assert cli.main(["native", "--library"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()

"""The runtime for GPUs, as far as it shows without one: packing, memory, Triton's interpreter and its compiler."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SHAPES, masks, weight
from tested_kernels import needs_native
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsify
from sparsify import CSRLinear, SparseLinear
from sparsify.inference.form_selection import FormSelector
from sparsify.kernels import form_for, gpu, pack, supports
from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import CSR, csr_to_dense, dense_to_csr
from sparsify.kernels.gpu import two_four
from sparsify.masking.patterns import nm_mask

TESTS = Path(__file__).parents[1]
CPU = torch.device("cpu")
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process in which Triton interprets its kernels: that is decided when they are defined."""
    # Of an array of one number Triton 3.6 makes a scalar: numpy 2.3 warns, 2.4 refuses.
    quiet = ("-W", "default:Conversion of an array:DeprecationWarning")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, *arguments]
    return subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def version(package: str) -> tuple[int, ...]:
    return tuple(int(number) for number in importlib.metadata.version(package).split(".")[:2])


@NEEDS_TRITON
@needs_native
def test_under_the_interpreter() -> None:
    """The kernels with all dtypes and activations, and the life of a layer in a form for GPUs: all take one path."""
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 does not run with numpy 2.4")
    life = "tiles and not (rows1 or relu or gelu or silu or dtype1 or second) or narrow and (copy or state_dict)"
    ran = interpreted("tests/kernels/gpu", "tests/kernels/test_forms.py", "-k", f"test_kernels or {life}")
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None
    assert int(passed[1]) >= 30, ran.stdout[-500:]


@pytest.mark.parametrize("form", ["tiles", "narrow"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 0), (0, 3), (2, 65600)])
def test_packing_and_unpacking_is_exact(form: str, shape: tuple[int, int]) -> None:
    dense = weight(shape)
    dense.view(-1)[::5] = -0.0
    dense.view(-1)[::7] = torch.nan
    tried = 0
    for mask in masks(shape).values() if 0 not in shape else [torch.ones(shape, dtype=torch.bool)]:
        csr = dense_to_csr(dense, mask)
        back = gpu.unpack(form, *gpu.pack(form, csr, shape), shape)
        for one, other in zip(csr, back, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        tried += 1
    assert tried


@pytest.mark.parametrize(("sparsity", "form", "share"), [(0.5, "tiles", 0.65), (0.9, "narrow", 0.25)])
@pytest.mark.parametrize("shape", [(512, 1024), (64, 11008), (100, 4100)])
def test_a_weight_takes_little_of_dense_bfloat16(
    sparsity: float, form: str, share: float, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the smallest form, which prefer="memory" takes, and in the one that a layer gets when it is moved to a GPU."""
    pretend_a_gpu(monkeypatch)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= sparsity
    csr = dense_to_csr(weight(shape, torch.bfloat16), mask)
    sizes = {form: sum(part.nbytes for part in gpu.pack(form, csr, shape)) for form in ("tiles", "narrow")}
    assert min(sizes.values()) <= share * 2 * mask.numel()
    assert form_for("panel", csr, shape) == form
    assert sizes[form] <= share * 2 * mask.numel()


def blocks(size: int, shape: tuple[int, int] = (128, 192)) -> CSR:
    """A weight that keeps a third of its blocks; NaN and -0.0 are among the values."""
    generator = torch.Generator().manual_seed(size)
    mask = torch.rand(shape[0] // size, shape[1] // size, generator=generator) < 0.3
    mask[0] = False  # an empty row, where there are several
    mask[-1, 0] = True
    dense = weight(shape)
    dense[-size, :3] = torch.tensor([torch.nan, -0.0, 0.0])
    return dense_to_csr(dense, mask.repeat_interleave(size, 0).repeat_interleave(size, 1))


def assert_same_bits(one: CSR, other: CSR) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_blocks_are_found_and_come_back_exactly(size: int) -> None:
    csr = blocks(size)
    assert gpu.fits("blocks", csr, (128, 192))
    index, values = gpu.pack("blocks", csr, (128, 192))
    assert_same_bits(gpu.unpack("blocks", index, values, (128, 192)), csr)
    assert index.nbytes == 4 * (128 // size + 1 + values.numel() // size**2)
    expanded = gpu.dense("blocks", index, values, (128, 192), (5, 77))
    torch.testing.assert_close(expanded, csr_to_dense(csr, (128, 192))[0][5:77], equal_nan=True)


def test_a_mask_that_is_not_whole_blocks_is_refused() -> None:
    mask = masks((64, 48))["half"]
    csr = dense_to_csr(weight((64, 48)), mask)
    assert not gpu.fits("blocks", csr, (64, 48))
    with pytest.raises(ValueError, match="needs whole blocks of one of the sizes"):
        gpu.pack("blocks", csr, (64, 48))
    assert not gpu.fits("blocks", dense_to_csr(weight((5, 3)), masks((5, 3))["all"]), (5, 3))


def compress(dense: torch.Tensor, alone: int) -> torch.Tensor:
    """What cuSPARSELt's compression does, as far as it is documented; `alone` is where it puts a value on its own."""
    groups = dense.reshape(-1, 4)
    places = torch.zeros(len(groups), 2, dtype=dense.dtype)
    for place, group in zip(places, groups, strict=True):
        kept = group[group.view(torch.int16) != 0]
        if len(kept) == 2:
            place[:] = kept
        elif len(kept) == 1:
            place[alone] = kept[0]
    values = places.reshape(len(dense), -1)
    metadata = torch.full((len(dense), dense.shape[1] // 16), 0x1234, dtype=torch.int16).view(dense.dtype)
    return torch.cat([values.reshape(-1), metadata.reshape(-1)]).reshape(len(dense), -1)


@pytest.mark.parametrize("alone", [0, 1])
def test_two_of_four_come_back_exactly_and_are_multiplied_padded(alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's operators need a GPU: here stand-ins say what they are documented to do."""
    shape = (32, 48)
    dense = weight(shape, torch.bfloat16)
    mask = nm_mask(dense.abs().float(), 2, 4)
    mask[3, :4] = False  # a group that keeps none, one that keeps one
    mask[4, :4] = torch.tensor([False, False, True, False])
    csr = dense_to_csr(dense, mask)
    asked = []

    def multiply(values: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, transpose_result: bool) -> torch.Tensor:
        asked.append(tuple(x.shape))
        assert transpose_result
        return F.linear(x.t(), dense * mask, bias)

    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: compress(weight, alone))
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    assert gpu.fits("2:4", csr, shape)
    index, values = gpu.pack("2:4", csr, shape)
    assert_same_bits(gpu.unpack("2:4", index, values, shape), csr)
    assert index.nbytes + values.nbytes <= 0.65 * dense.nbytes
    x, bias = weight((2, 5, 48), torch.bfloat16), weight((1, 32), torch.bfloat16)[0]
    expected = F.relu(F.linear(x, dense * mask, bias))
    torch.testing.assert_close(gpu.linear("2:4", x, index, values, bias, shape, 1, (0, 32)), expected)
    torch.testing.assert_close(gpu.linear("2:4", x, index, values, bias, shape, 1, (3, 9)), expected[..., 3:9])
    assert asked == [(48, 16)]

    kept_zero = torch.where(torch.arange(48) == int(mask[0].nonzero()[0]), 0.0, dense.float()).bfloat16()
    # A kept zero is lost where the compression moves the value beside it: then the form does not fit.
    assert gpu.fits("2:4", dense_to_csr(kept_zero, mask), shape) == (alone == 1)
    minus_zero = torch.where(kept_zero == 0, -0.0, kept_zero)
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: compress(weight + 0.0, alone))  # the sign is lost
    assert not gpu.fits("2:4", dense_to_csr(minus_zero, mask), shape)
    assert not gpu.fits("2:4", dense_to_csr(dense, torch.ones_like(mask)), shape)
    with pytest.raises(ValueError, match="needs a 2:4 mask of a shape in multiples of 16"):
        gpu.pack("2:4", dense_to_csr(dense[:5], mask[:5]), (5, 48))


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has the kernels of a GPU from now on, and no others."""
    monkeypatch.setattr(native, "why_missing", lambda: "this is a GPU")
    monkeypatch.setattr(gpu, "why_missing", lambda _: "")


def test_two_of_four_are_compressed_anew_in_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are compressed to is not all numbers: converted it would be garbage."""
    pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(two_four, "why_missing", lambda _: "")
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: compress(weight, 0))
    dense = weight((32, 48), torch.float16)
    csr = dense_to_csr(dense, nm_mask(dense.abs().float(), 2, 4))
    layer = CSRLinear(48, 32, csr, form="2:4")
    assert layer.bfloat16().form == "2:4"
    expected = gpu.pack("2:4", CSR(csr.crow, csr.col, csr.values.bfloat16()), (32, 48))
    assert all(torch.equal(one, other) for one, other in zip(layer.parts, expected, strict=True))


class Stays(TorchDispatchMode):
    """Lets no operator give a result on another device; those that need a value fail on tensors without data."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.n_seen = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device == self.device, func
                self.n_seen += 1
        return result


@NEEDS_TRITON
@pytest.mark.parametrize("form", gpu.FORMS)
def test_a_product_waits_for_nothing_and_runs_where_its_tensors_are(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second of two devices, without data, and with launches that do nothing."""
    sys.path.insert(0, str(TESTS / "gpu"))
    from launches import seen

    device, shape, current = torch.device("cuda", 1), (64, 1088), []

    @contextlib.contextmanager
    def on(other: torch.device) -> Iterator[None]:
        current.append(other)
        yield
        current.pop()

    monkeypatch.setattr(gpu.launch, "on", on)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: compress(weight, 0))
    csr = blocks(64, shape) if form == "blocks" else dense_to_csr(weight(shape), nm_mask(weight(shape).abs(), 2, 4))
    parts = gpu.pack(form, csr._replace(values=csr.values.bfloat16()), shape)
    with FakeTensorMode() as fake, seen(run=False, also=lambda: where.append(current[-1])):
        where: list[torch.device] = []
        index, values = (fake.from_tensor(part).to(device) for part in parts)
        bias = torch.empty(64, dtype=torch.bfloat16, device=device)
        with Stays(device) as stays:
            for tokens in (1, 2, 16, 100, 500):
                x = torch.empty(tokens, shape[1], dtype=torch.bfloat16, device=device)
                for rows in ((0, 64), (3, 60)):
                    y = gpu.linear(form, x, index, values, bias, shape, 1, rows)
                    assert y.shape == (tokens, rows[1] - rows[0])
            gpu.dense(form, index, values, shape, (3, 60))
        assert stays.n_seen > 10
    assert set(where) == ({device} if form != "2:4" else set())
    assert not current


def test_two_layers_alike_but_for_their_pattern_are_measured_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_a_gpu(monkeypatch)
    model = sparsify.convert(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)))
    sparsify.prune(model[0], 0.5, pattern="16x16")
    sparsify.prune(model[1], 0.5)
    monkeypatch.setattr(FormSelector, "_measure", lambda _, candidates, x: {form: 1 / len(form) for form in candidates})
    assert [row.format for row in sparsify.report(sparsify.export(model))] == ["blocks", "narrow"]


@needs_native
@pytest.mark.parametrize(("sparsity", "form"), [(0.5, "tiles"), (0.9, "narrow")])
def test_a_layer_that_moves_to_a_gpu_and_back_changes_its_form_and_no_bit(sparsity: float, form: str) -> None:
    layer = CSRLinear.from_sparse(SparseLinear(70, 30, sparsity, seed=0), form="bitmask")
    before = layer.csr
    with pytest.MonkeyPatch.context() as patched:
        pretend_a_gpu(patched)
        layer._apply(lambda tensor: tensor.clone())
        assert (layer.form, set(layer._buffers)) == (form, {"index", "values"})
        assert_same_bits(layer.csr, before)
        state = layer.state_dict()
        assert set(state) == {"bias", "crow", "col", "values"}
        assert layer.bfloat16().form == form
        assert layer.double().form == "csr"
        layer.float()
        layer.load_state_dict(state)
        assert layer.form == form
    layer._apply(lambda tensor: tensor.clone())
    assert layer.form == "bitmask"
    assert_same_bits(layer.csr, before)


@needs_native
def test_blocks_become_tiles_for_a_mask_that_has_none_and_blocks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_a_gpu(monkeypatch)
    shape = (128, 192)
    layer = CSRLinear(192, 128, blocks(32), form="blocks")
    state, other = (
        layer.state_dict(),
        CSRLinear.from_sparse(SparseLinear(192, 128, 0.5, bias=False, seed=0), form="csr"),
    )
    layer.load_state_dict(other.state_dict())
    assert layer.form == "tiles"
    assert_same_bits(layer.csr, other.csr)
    layer.load_state_dict(state)
    assert layer.form == "blocks"
    assert_same_bits(layer.csr, blocks(32, shape))
    model = sparsify.prune(sparsify.convert(torch.nn.Sequential(torch.nn.Linear(192, 128))), 0.5)
    with pytest.raises(ValueError, match="0: its mask does not fit the form 'blocks'"):
        sparsify.export(model, format="blocks")


@needs_native
def test_what_was_packed_on_a_gpu_is_saved_and_loaded_on_the_cpu(tmp_path: Path) -> None:
    model = sparsify.prune(sparsify.convert(torch.nn.Sequential(torch.nn.Linear(70, 30))), 0.8)
    with pytest.MonkeyPatch.context() as patched:
        pretend_a_gpu(patched)
        there = sparsify.export(model, format="narrow")
        sparsify.save(there, tmp_path / "model.safetensors")
    here = sparsify.load(tmp_path / "model.safetensors", torch.nn.Sequential(torch.nn.Linear(70, 30)))
    assert here[0].form == "panel"
    assert_same_bits(here[0].csr, there[0].csr)
    assert torch.equal(here(torch.ones(2, 70)), sparsify.export(model, format="panel")(torch.ones(2, 70)))
    with pytest.MonkeyPatch.context() as patched:
        pretend_a_gpu(patched)
        here._apply(lambda tensor: tensor.clone())
        assert here[0].form == "narrow"  # the choice, not the stand-in: that would be "tiles" here
        assert_same_bits(here[0].csr, there[0].csr)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is asked for")
def test_on_the_cpu_the_forms_for_gpus_are_refused() -> None:
    assert not supports("tiles", CPU, torch.float32)
    csr = dense_to_csr(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="'narrow' does not run here: it needs the kernels for GPUs: they run on"):
        pack("narrow", csr, (2, 3))


def test_a_device_without_kernels_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    assert "an old GPU has compute capability (7, 5), (8, 0) is needed" in gpu.why_missing(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert gpu.why_missing(cuda) == ""
    assert supports("tiles", cuda, torch.bfloat16)
    assert not supports("tiles", cuda, torch.float64)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert supports("2:4", cuda, torch.bfloat16)
    assert not supports("2:4", cuda, torch.float32)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert not supports("2:4", cuda, torch.bfloat16)
    assert "not on xpu" in gpu.why_missing(torch.device("xpu"))
    with monkeypatch.context() as amd:
        amd.setattr(torch.version, "cuda", None)
        amd.setattr(torch.version, "hip", "7.0")
        assert "an NVIDIA GPU, not on ROCm" in gpu.why_missing(cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install triton" in gpu.why_missing(cuda)


def launches_of(dtype: torch.dtype) -> list[Any]:
    """Every launch there is, made with the sizes of real layers but never run."""
    sys.path.insert(0, str(TESTS / "gpu"))
    from launches import seen

    shape = (64, 4096)
    found = []
    with seen(run=False) as launches:
        for form, tokens in (("tiles", (2, 1, 128, 16)), ("narrow", (8, 1))):
            mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= 0.8
            parts = gpu.pack(form, dense_to_csr(weight(shape, dtype), mask), shape)
            for n in tokens:
                gpu.linear(
                    form, torch.empty(n, 4096, dtype=dtype), *parts, torch.empty(64, dtype=dtype), shape, 2, (0, 64)
                )
            gpu.dense(form, *parts, shape, (0, 64))
        for size in (64, 16):
            parts = gpu.pack("blocks", CSR(*blocks(size, shape)[:2], blocks(size, shape).values.to(dtype)), shape)
            for n in (64, 1):
                gpu.linear("blocks", torch.empty(n, 4096, dtype=dtype), *parts, None, shape, 0, (0, 64))
        found += launches
    return found


#: What a program may take: 99 KiB on those of capability 8 that have the least, 8.6 and 8.9.
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10}


@NEEDS_TRITON
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("dtype", "capability", "all_sizes"),
    [(torch.bfloat16, 90, True), (torch.float16, 80, False), (torch.float32, 90, False)],
)
def test_every_kernel_compiles_for_a_gpu(dtype: torch.dtype, capability: int, all_sizes: bool) -> None:
    """No GPU is needed for that. No kernel spills registers, and the many tokens of 16 bits meet tensor cores."""
    launches = launches_of(dtype)
    from compiled import compile_launch

    names: set[str] = set()
    for launch in launches:
        if launch.name in names and not all_sizes:  # the largest come first
            continue
        kernel = compile_launch(launch, capability)
        names.add(launch.name)
        assert kernel.stack_bytes == 0, launch.name
        assert kernel.shared_bytes <= SHARED_BYTES[capability], launch.name
        if launch.name == "tiles.many" and dtype != torch.float32:
            assert ("wgmma" if capability == 90 else "mma.sync") in kernel.ptx
        if launch.name.startswith("tiles."):
            assert "popc" in kernel.ptx
    tiles = {"tiles.few", "tiles.many", "tiles.dense", "epilogue.finish"}
    assert names == tiles | {"narrow.few", "narrow.dense", "blocks.multiply"}

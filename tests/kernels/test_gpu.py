"""Kernels for GPUs without a GPU: Triton's interpreter and compiler, and the devices that are refused."""

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
from cases import weight
from gpu_weights import NEEDS_TRITON, blocks, compress
from launches import seen
from tested_kernels import needs_native
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsify.kernels import gpu, pack, supports
from sparsify.kernels.csr import CSR, dense_to_csr
from sparsify.masking.patterns import nm_mask

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process in which Triton interprets its kernels: that is decided when they are defined."""
    # Of an array of one number Triton 3.6 makes a scalar: numpy 2.3 warns, 2.4 refuses.
    quiet = ("-W", "default:Conversion of an array:DeprecationWarning")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, *arguments]
    return subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
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

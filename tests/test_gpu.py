"""The runtime for GPUs, as far as it shows without one: packing, memory, Triton's interpreter and its compiler."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import SHAPES, masks, weight

from sparsify.formats import dense_to_csr
from sparsify.kernels import gpu, pack, supports

TESTS = Path(__file__).parent
CPU = torch.device("cpu")
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process in which Triton interprets its kernels: that is decided when they are defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@NEEDS_TRITON
@pytest.mark.parametrize(
    "arguments",
    [
        ("tests/gpu",),
        # The life of a layer, in the forms for GPUs; the activations are among the kernels' own tests.
        (
            "tests/test_forms.py",
            "-k",
            "(tiles or narrow) and not (rows1 or relu or gelu or silu or bfloat16 or second)",
        ),
    ],
    ids=lambda arguments: arguments[0],
)
def test_under_the_interpreter(arguments: tuple[str, ...]) -> None:
    ran = interpreted(*arguments)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None
    assert int(passed[1]) >= 10, ran.stdout[-500:]


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


@pytest.mark.parametrize(("sparsity", "share"), [(0.5, 0.65), (0.9, 0.25)])
def test_the_smallest_form_takes_little_of_dense_bfloat16(sparsity: float, share: float) -> None:
    shape = (512, 1024)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= sparsity
    csr = dense_to_csr(weight(shape, torch.bfloat16), mask)
    sizes = [sum(part.nbytes for part in gpu.pack(form, csr, shape)) for form in ("tiles", "narrow")]
    assert min(sizes) <= share * 2 * mask.numel()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is asked for")
def test_on_the_cpu_the_forms_for_gpus_are_refused_and_triton_is_not_imported() -> None:
    assert not supports("tiles", CPU, torch.float32)
    csr = dense_to_csr(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="'narrow' does not run here: it needs the Triton kernels: they run on a GPU"):
        pack("narrow", csr, (2, 3))
    code = "import sys, torch; seen = set(sys.modules); import sparsify; assert 'triton' not in {*sys.modules} - seen"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    assert "not on xpu" in gpu.why_missing(torch.device("xpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install triton" in gpu.why_missing(cuda)


def launches_of(dtype: torch.dtype) -> list[object]:
    """Every launch there is, made with the sizes of real layers but never run."""
    from launches import seen

    shape = (64, 4096)
    found = []
    with seen(run=False) as launches:
        for form, tokens in (("tiles", (1, 2, 16, 128)), ("narrow", (1, 8))):
            mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= 0.8
            parts = gpu.pack(form, dense_to_csr(weight(shape, dtype), mask), shape)
            for n in tokens:
                gpu.linear(
                    form, torch.empty(n, 4096, dtype=dtype), *parts, torch.empty(64, dtype=dtype), shape, 2, (0, 64)
                )
            gpu.dense(form, *parts, shape, (0, 64))
        found += launches
    return found


@NEEDS_TRITON
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_every_kernel_compiles_for_a_gpu(
    dtype: torch.dtype, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is needed for that. No kernel spills registers, and the many tokens of 16 bits meet tensor cores."""
    if capability == 80 and dtype != torch.bfloat16:
        pytest.skip("one dtype is enough for the older target")
    sys.path.insert(0, str(TESTS / "gpu"))
    from compiled import compile_launch

    names = set()
    for launch in launches_of(dtype):
        kernel = compile_launch(launch, capability)
        names.add(launch.name)
        assert kernel.stack_bytes == 0, launch.name
        if launch.name == "tiles.many" and dtype != torch.float32:
            assert ("wgmma" if capability == 90 else "mma.sync") in kernel.ptx
        if launch.name.startswith("tiles."):
            assert "popc" in kernel.ptx
    assert names == {"tiles.few", "tiles.many", "tiles.dense", "epilogue.finish", "narrow.few", "narrow.dense"}

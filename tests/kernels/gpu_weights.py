"""Weights in the forms for GPUs, and a CPU that passes for a GPU."""

import importlib.metadata
import importlib.util

import pytest
import torch
from cases import weight

from sparsify.kernels import gpu
from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import CSR, dense_to_csr

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


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


def compress(dense: torch.Tensor, alone: int) -> torch.Tensor:
    """Compress as cuSPARSELt does, as far as it is documented; a single value of four goes to the place `alone`."""
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


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has the kernels of a GPU from now on, and no others."""
    monkeypatch.setattr(native, "why_missing", lambda: "this is a GPU")
    monkeypatch.setattr(gpu, "why_missing", lambda _: "")

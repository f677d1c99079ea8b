"""The forms for GPUs, packed and unpacked on the CPU: exact, small, and refused for a mask of another kind."""

import pytest
import torch
import torch.nn.functional as F
from cases import SHAPES, masks, weight
from gpu_weights import assert_same_bits, blocks, compress, pretend_a_gpu

from sparsify import CSRLinear
from sparsify.kernels import form_for, gpu
from sparsify.kernels.csr import CSR, csr_to_dense, dense_to_csr
from sparsify.kernels.gpu import two_four
from sparsify.masking.patterns import nm_mask


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


def test_two_of_four_are_compressed_anew_in_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their compressed form is not all numbers: converted it would be garbage."""
    pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(two_four, "why_missing", lambda _: "")
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: compress(weight, 0))
    dense = weight((32, 48), torch.float16)
    csr = dense_to_csr(dense, nm_mask(dense.abs().float(), 2, 4))
    layer = CSRLinear(48, 32, csr, form="2:4")
    assert layer.bfloat16().form == "2:4"
    expected = gpu.pack("2:4", CSR(csr.crow, csr.col, csr.values.bfloat16()), (32, 48))
    assert all(torch.equal(one, other) for one, other in zip(layer.tensors, expected, strict=True))

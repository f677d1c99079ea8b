"""The form "blocks": whole blocks of 16, 32 or 64 rows and columns, kept or removed. For tensor cores, at any sparsity.

The index is two lists of int32: the beginning of each row of blocks (out / size + 1), and the column of each block.
The values are the blocks one after the other, each in rows. Only one size fits the length of both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsify.kernels.csr import CSR, csr_to_dense, dense_to_csr
from sparsify.kernels.gpu import launch, sections
from sparsify.kernels.gpu.weight import Weight

#: Sizes of a block, the best first.
SIZES = (64, 32, 16)

#: Tokens of a tile: at least, as tensor cores want, and at most.
FEWEST_TOKENS, MOST_TOKENS = 16, 64


def fits(csr: CSR, shape: tuple[int, int]) -> bool:
    """Return whether the kept weights are whole blocks."""
    return 0 not in shape and _size_of(csr, shape) is not None


def pack(csr: CSR, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pack a CSR weight: (index, values). Raises ValueError if its kept weights are no whole blocks."""
    size = _size_of(csr, shape) if 0 not in shape else None
    if size is None:
        raise ValueError(f"the form 'blocks' needs whole blocks of one of the sizes {SIZES}; use 'tiles' or 'narrow'")
    weight, mask = (_in_blocks(tensor, size) for tensor in csr_to_dense(csr, shape))
    kept = mask[:, :, 0, 0]
    rows = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    lists = torch.cat([rows, kept.nonzero()[:, 1]]).to(torch.int32)
    return lists.view(torch.uint8), weight[kept].reshape(-1)


def check(index: Tensor, n_values: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless the two lists fit one size of blocks, and columns rise within each row of blocks."""
    size = _size_for(index.numel() // 4, n_values, shape[0])
    if size is None or index.numel() % 4 or n_values % size**2 or shape[0] % size or shape[1] % size:
        raise ValueError(f"no size of blocks fits {index.numel()} bytes and {n_values} values of a weight {shape}")
    starts, columns = _lists(index, size, shape[0])
    sections.check_rows(starts, columns.numel())
    n_columns = shape[1] // size
    if columns.numel() == 0:
        return
    if int(columns.min()) < 0 or int(columns.max()) >= n_columns:
        raise ValueError(f"the columns of blocks must lie in [0, {n_columns})")
    rows = torch.arange(starts.numel() - 1, device=index.device)
    rows = torch.repeat_interleave(rows, starts.diff(), output_size=columns.numel())
    if bool(((rows * n_columns + columns).diff() <= 0).any()):
        raise ValueError("the columns of blocks do not rise within each row")


def unpack(index: Tensor, values: Tensor, shape: tuple[int, int]) -> CSR:
    """Turn the form back into CSR."""
    whole = Weight(index, values, shape, (0, shape[0]))
    ones = replace(whole, values=torch.ones_like(values, dtype=torch.bool))
    return dense_to_csr(dense(whole), dense(ones))


def multiply(x: Tensor, weight: Weight, bias: Tensor | None, activation: int) -> Tensor | None:
    """Multiply x (tokens, in), as many as there are."""
    from sparsify.kernels.gpu.triton import blocks as triton_blocks

    size, (first, end) = _size(weight), weight.rows
    tokens = max(FEWEST_TOKENS, min(MOST_TOKENS, launch.power_of_2(x.shape[0])))
    n_block_rows = -(-end // size) - first // size
    return launch.multiply(
        triton_blocks.multiply, (n_block_rows * -(-x.shape[0] // tokens),), x, weight, bias, activation,
        (n_block_rows, 4 * (weight.shape[0] // size + 1)),
        TOKENS=tokens, SIZE=size, IS_WIDENED=launch.is_widened(x), num_warps=max(1, size // 16), num_stages=3,
    )  # fmt: skip


def dense(weight: Weight) -> Tensor:
    """Expand to a dense weight."""
    (out, inner), (first, end), size = weight.shape, weight.rows, _size(weight)
    starts, columns = _lists(weight.index, size, out)
    block_rows = torch.arange(out // size, device=starts.device)
    row = torch.repeat_interleave(block_rows, starts.diff(), output_size=columns.numel())
    blocks = weight.values.new_zeros((out // size, inner // size, size, size))
    blocks[row, columns.to(torch.int64)] = weight.values.reshape(-1, size, size)
    return blocks.transpose(1, 2).reshape(out, inner)[first:end]


def _in_blocks(weight: Tensor, size: int) -> Tensor:
    """View a weight as (rows of blocks, columns of blocks, size, size)."""
    out, inner = weight.shape
    return weight.reshape(out // size, size, inner // size, size).transpose(1, 2)


def _size_of(csr: CSR, shape: tuple[int, int]) -> int | None:
    """Return the largest size that divides the kept weights into whole blocks."""
    fitting = [size for size in SIZES if shape[0] % size == 0 and shape[1] % size == 0]
    if not fitting or csr.values.numel() % fitting[-1] ** 2:
        return None
    _, mask = csr_to_dense(csr, shape)
    for size in fitting:
        kept = _in_blocks(mask, size).sum((2, 3))
        if bool(((kept == 0) | (kept == size**2)).all()):
            return size
    return None


def _size(weight: Weight) -> int:
    """Return the size: the longer the blocks, the shorter the lists, so only one can be right."""
    size = _size_for(weight.index.numel() // 4, weight.values.numel(), weight.shape[0])
    assert size is not None
    return size


def _size_for(n: int, n_values: int, out: int) -> int | None:
    """Return the size with n entries in both lists together."""
    return next((size for size in SIZES if out // size + 1 + n_values // size**2 == n), None)


def _lists(index: Tensor, size: int, out: int) -> tuple[Tensor, Tensor]:
    """Return the beginning of each row of blocks, and the column of each block."""
    lists = index.view(torch.int32)
    return lists[: out // size + 1], lists[out // size + 1 :]

"""The form "tiles": a bit for each weight, and the kept values in rows. For tensor cores, at moderate sparsity.

Every row of the mask is padded to whole groups of 64 columns, 8 bytes, the first column in the lowest bit. A start
counts the values of its row before a group, so any part of the weight can be expanded by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.kernels.csr import CSR, col_dtype
from sparsify.kernels.gpu import bits, launch, sections
from sparsify.kernels.gpu.weight import Weight

#: Columns in a group.
GROUP = 64

#: How many tokens each kernel takes; more are left to a dense product. Reasoned, not yet measured.
FEW_TOKENS = 2
MANY_TOKENS = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 32}

#: Few tokens: bytes of a row that a program reads at once, and times its rows. A thread of 128 takes 4 bytes.
FEW_BYTES, FEW_TILE = 128, 512

#: Many tokens: rows and columns of a tile, and the fewest tiles that a split of the columns is worth.
MANY_ROWS, MANY_STEPS = 64, 4
MANY_COLUMNS = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}

#: Expansion to dense: rows and columns of a tile.
DENSE_TILE = (16, 256)


def n_groups(in_features: int) -> int:
    """Return the number of groups in a row."""
    return -(-in_features // GROUP)


def pack(csr: CSR, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pack a CSR weight: (index, values)."""
    out, inner = shape
    kept = torch.zeros(out, n_groups(inner) * GROUP, dtype=torch.bool, device=csr.values.device)
    rows = torch.repeat_interleave(torch.arange(out, device=kept.device), csr.crow.diff(), output_size=csr.col.numel())
    kept[rows, csr.col.to(torch.int64)] = True
    # One value more: the kernels read on before they know that there is nothing.
    return _index_of(kept, shape), F.pad(csr.values.detach(), (0, 1))


def check(index: Tensor, n_values: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless this is the index of its own bits, with one value fewer kept than there are."""
    out, inner = shape
    groups = n_groups(inner)
    n_bytes = sections.layout(shape, groups).rest_at + out * groups * GROUP // 8
    if index.numel() != n_bytes:
        raise ValueError(
            f"the index of a weight {shape} in the form 'tiles' takes {n_bytes} bytes, got {index.numel()}"
        )
    kept = bits.unpack(sections.split(index, shape, groups)[2]).view(out, groups * GROUP)
    n_kept = int(kept.sum())
    if bool(kept[:, inner:].any()) or n_kept != n_values - 1 or not torch.equal(_index_of(kept, shape), index):
        raise ValueError(f"the index in the form 'tiles' does not fit its own bits and {n_values - 1} values")


def unpack(index: Tensor, values: Tensor, shape: tuple[int, int]) -> CSR:
    """Turn the form back into CSR."""
    out, inner = shape
    crow, _, mask = sections.split(index, shape, n_groups(inner))
    columns = bits.unpack(mask).view(out, n_groups(inner) * GROUP).nonzero()[:, 1]
    return CSR(crow.clone(), columns.to(col_dtype(inner)), values[:-1].detach().clone())


def multiply(x: Tensor, weight: Weight, bias: Tensor | None, activation: int) -> Tensor | None:
    """Multiply x (tokens, in); None for more tokens than there is a kernel for."""
    tokens = x.shape[0]
    if tokens <= FEW_TOKENS:
        return _multiply_few(x, weight, bias, activation)
    return _multiply_many(x, weight, bias, activation) if tokens <= MANY_TOKENS[x.dtype] else None


def dense(weight: Weight) -> Tensor:
    """Expand to a dense weight."""
    from sparsify.kernels.gpu.triton import tiles as triton_tiles

    sizes, is_wide = _sizes(weight)
    y = weight.values.new_empty((weight.n_rows, weight.shape[1]))
    grid = tuple(-(-n // tile) for n, tile in zip(y.shape, DENSE_TILE, strict=True))
    kernel: Any = triton_tiles.dense[grid]
    kernel(
        weight.index, weight.values, y, weight.rows[0], weight.n_rows, *sizes,
        ROWS=DENSE_TILE[0], COLUMNS=DENSE_TILE[1], IS_WIDE=is_wide, num_warps=4, **launch.FUSED,
    )  # fmt: skip
    return y


def _multiply_few(x: Tensor, weight: Weight, bias: Tensor | None, activation: int) -> Tensor:
    from sparsify.kernels.gpu.triton import tiles as triton_tiles

    sizes, is_wide = _sizes(weight)
    n_bytes = min(FEW_BYTES, launch.power_of_2(8 * n_groups(weight.shape[1])))
    n_rows = FEW_TILE // n_bytes
    return launch.multiply(
        triton_tiles.few, (-(-weight.n_rows // n_rows),), x, weight, bias, activation, sizes,
        TOKENS=launch.power_of_2(x.shape[0]), ROWS=n_rows, BYTES=n_bytes, IS_WIDE=is_wide, num_warps=4,
    )  # fmt: skip


def _multiply_many(x: Tensor, weight: Weight, bias: Tensor | None, activation: int) -> Tensor:
    """Multiply on tensor cores. Few rows leave processors idle: then the columns are split, and the sums added up."""
    from sparsify.kernels.gpu.triton import tiles as triton_tiles

    tokens, columns, (sizes, is_wide) = x.shape[0], MANY_COLUMNS[x.dtype], _sizes(weight)
    n_programs, n_steps = -(-weight.n_rows // MANY_ROWS), -(-weight.shape[1] // columns)
    wanted = max(1, min(launch.programs_wanted(x.device) // n_programs, n_steps // MANY_STEPS))
    steps = -(-n_steps // wanted)
    splits = -(-n_steps // steps)
    partial = x.new_empty((splits, tokens, weight.n_rows), dtype=torch.float32) if splits > 1 else None
    y = launch.multiply(
        triton_tiles.many, (n_programs, splits), x, weight, bias, activation, (*sizes, steps * columns), into=partial,
        TOKENS=max(16, launch.power_of_2(tokens)), ROWS=MANY_ROWS, COLUMNS=columns, IS_WIDE=is_wide,
        IS_SPLIT=splits > 1, IS_WIDENED=launch.is_widened(x), num_warps=4, num_stages=3,
    )  # fmt: skip
    return y if partial is None else launch.finish(partial, bias, activation, x.dtype)


def _index_of(kept: Tensor, shape: tuple[int, int]) -> Tensor:
    """Make the index of a mask (out, columns of whole groups)."""
    counts = kept.view(shape[0], n_groups(shape[1]), GROUP).sum(2)
    crow = F.pad(kept.sum(1).cumsum(0), (1, 0))
    return sections.join(crow, counts.cumsum(1) - counts, bits.pack(kept), shape)


def _sizes(weight: Weight) -> tuple[tuple[int, int, int, int], bool]:
    """Return the sizes for all kernels, and whether starts are int32."""
    inner, groups = weight.shape[1], n_groups(weight.shape[1])
    where = sections.layout(weight.shape, groups)
    return (inner, groups, where.starts_at, where.rest_at), where.is_wide

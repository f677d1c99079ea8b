"""The form "tiles": a bit for each weight, and the kept values in rows. For tensor cores, at moderate sparsity.

Every row of the mask is padded to whole groups of 64 columns, 8 bytes, the first column in the lowest bit. A start
says how many values of its row lie before a group, so that any part of the weight can be expanded by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.formats import CSR, col_dtype
from sparsify.kernels.gpu import index, launch

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
    groups = n_groups(inner)
    kept = torch.zeros(out, groups * GROUP, dtype=torch.bool, device=csr.values.device)
    rows = torch.repeat_interleave(torch.arange(out, device=kept.device), csr.crow.diff(), output_size=csr.col.numel())
    kept[rows, csr.col.to(torch.int64)] = True
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=kept.device)
    bits = (kept.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
    counts = kept.view(out, groups, GROUP).sum(2)
    # One value more: the kernels read on before they know that there is nothing.
    return index.join(csr.crow, counts.cumsum(1) - counts, bits, shape), F.pad(csr.values.detach(), (0, 1))


def unpack(packed: Tensor, values: Tensor, shape: tuple[int, int]) -> CSR:
    """Turn the form back into CSR."""
    out, inner = shape
    crow, _, bits = index.split(packed, shape, n_groups(inner))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    kept = (bits[:, None] >> shifts) & 1
    columns = kept.view(out, n_groups(inner) * GROUP).nonzero()[:, 1]
    return CSR(crow.clone(), columns.to(col_dtype(inner)), values[:-1].detach().clone())


def multiply(
    x: Tensor,
    packed: Tensor,
    values: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    rows: tuple[int, int],
    activation: int,
) -> Tensor | None:
    """Multiply x (tokens, in) by some rows of the weight; None for more tokens than there is a kernel for."""
    from sparsify.kernels.gpu import triton_tiles

    tokens, (first, end), inner = x.shape[0], rows, shape[1]
    out = end - first
    groups = n_groups(inner)
    where = index.sections(shape, groups)
    y = x.new_empty((tokens, out))
    given = (x, packed, values, y if bias is None else bias)
    sizes = (tokens, x.stride(0), first, out, inner, groups, where.starts_at, where.rest_at)
    common: dict[str, Any] = {
        "IS_WIDE": where.is_wide, "HAS_BIAS": bias is not None, "ACTIVATION": activation, "num_warps": 4, **launch.FUSED
    }  # fmt: skip
    if tokens <= FEW_TOKENS:
        n_bytes = min(FEW_BYTES, launch.power_of_2(8 * groups))
        n_rows = FEW_TILE // n_bytes
        few: Any = triton_tiles.few[(-(-out // n_rows),)]
        few(*given, y, *sizes, TOKENS=launch.power_of_2(tokens), ROWS=n_rows, BYTES=n_bytes, **common)
        return y
    if tokens > MANY_TOKENS[x.dtype]:
        return None
    columns = MANY_COLUMNS[x.dtype]
    n_programs, n_steps = -(-out // MANY_ROWS), -(-inner // columns)
    wanted = max(1, min(launch.programs_wanted(x.device) // n_programs, n_steps // MANY_STEPS))
    steps = -(-n_steps // wanted)
    splits = -(-n_steps // steps)
    target = y if splits == 1 else x.new_empty((splits, tokens, out), dtype=torch.float32)
    many: Any = triton_tiles.many[(n_programs, splits)]
    many(
        *given, target, *sizes, steps * columns,
        TOKENS=max(16, launch.power_of_2(tokens)), ROWS=MANY_ROWS, COLUMNS=columns,
        IS_SPLIT=splits > 1, IS_WIDENED=launch.is_widened(x), num_stages=3, **common,
    )  # fmt: skip
    if splits > 1:
        launch.finish(target, bias, y, activation)
    return y


def dense(packed: Tensor, values: Tensor, shape: tuple[int, int], rows: tuple[int, int]) -> Tensor:
    """Expand some rows to a dense weight."""
    from sparsify.kernels.gpu import triton_tiles

    (first, end), inner = rows, shape[1]
    out, groups = end - first, n_groups(inner)
    where = index.sections(shape, groups)
    weight = values.new_empty((out, inner))
    n_rows, n_columns = DENSE_TILE
    kernel: Any = triton_tiles.dense[(-(-out // n_rows), -(-inner // n_columns))]
    kernel(
        packed, values, weight, first, out, inner, groups, where.starts_at, where.rest_at,
        ROWS=n_rows, COLUMNS=n_columns, IS_WIDE=where.is_wide, num_warps=4, **launch.FUSED,
    )  # fmt: skip
    return weight

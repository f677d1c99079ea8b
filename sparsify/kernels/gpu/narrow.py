"""The form "narrow": CSR with one byte a column. Work and memory follow the kept weights alone: for high sparsity.

A row is cut into windows of 256 columns; a column is a byte within its window, a start says how many values of its row
lie before a window. The last start of a row is their number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.csr import CSR, col_dtype, csr_positions
from sparsify.kernels.gpu import launch, sections
from sparsify.kernels.gpu.weight import Weight

#: Columns in a window.
WINDOW = 256

#: How many tokens a program takes, and how many the kernel does, going over the weight for every few; more are left to
#: a dense product. Reasoned, not yet measured.
FEW_TOKENS, MOST_TOKENS = 8, 32

#: The tile of a program: windows it takes at once, lanes that walk in each, and the steps they take at once, which are
#: bounded alone and times the tokens: each has its own sum in a register.
WINDOWS_AT_ONCE, LANES, MAX_STEPS, MAX_SUMS = 16, 8, 8, 16


def n_windows(in_features: int) -> int:
    """Return the number of windows in a row."""
    return -(-in_features // WINDOW)


def pack(csr: CSR, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pack a CSR weight: (index, values)."""
    out, inner = shape
    edges = (torch.arange(n_windows(inner) + 1, device=csr.col.device) * WINDOW).clamp(max=inner)
    rows = torch.arange(out, device=csr.col.device)[:, None] * inner
    before = torch.searchsorted(csr_positions(csr, inner), rows + edges)
    starts = before - csr.crow[:-1, None]
    bytes_ = (csr.col.to(torch.int32) % WINDOW).to(torch.uint8)
    return sections.join(csr.crow, starts, bytes_, shape), csr.values.detach().clone()


def check(index: Tensor, n_values: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless the columns of so many values rise within each row of the index."""
    out, inner = shape
    n_starts = n_windows(inner) + 1
    n_bytes = sections.layout(shape, n_starts).rest_at + n_values
    if index.numel() != n_bytes:
        raise ValueError(
            f"the index of a weight {shape} in the form 'narrow' with {n_values} values takes {n_bytes} bytes, "
            f"got {index.numel()}"
        )
    crow, starts, _ = sections.split(index, shape, n_starts)
    sections.check_rows(crow, n_values)
    per_window = starts.diff(dim=1)
    if bool((starts[:, 0] != 0).any() or (per_window < 0).any() or (starts[:, -1] != crow.diff()).any()):
        raise ValueError("the starts of the windows in the form 'narrow' do not fit the rows")
    columns = _columns(index, n_values, shape)
    rows = torch.repeat_interleave(torch.arange(out, device=index.device), crow.diff(), output_size=n_values)
    if bool((columns >= inner).any()) or bool(((rows * inner + columns).diff() <= 0).any()):
        raise ValueError("the columns in the form 'narrow' do not rise within each row")


def unpack(index: Tensor, values: Tensor, shape: tuple[int, int]) -> CSR:
    """Turn the form back into CSR."""
    crow, _, _ = sections.split(index, shape, n_windows(shape[1]) + 1)
    columns = _columns(index, values.numel(), shape)
    return CSR(crow.clone(), columns.to(col_dtype(shape[1])), values.detach().clone())


def multiply(x: Tensor, weight: Weight, bias: Tensor | None, activation: int) -> Tensor | None:
    """Multiply x (tokens, in); None for more tokens than there is a kernel for."""
    from sparsify.kernels.gpu.triton import narrow as triton_narrow

    tokens = x.shape[0]
    if tokens > MOST_TOKENS:
        return None
    slots = min(FEW_TOKENS, launch.power_of_2(tokens))
    sizes, options = _tile(weight, slots)
    grid = (weight.n_rows, -(-tokens // slots))
    return launch.multiply(triton_narrow.few, grid, x, weight, bias, activation, sizes, TOKENS=slots, **options)


def dense(weight: Weight) -> Tensor:
    """Expand to a dense weight."""
    from sparsify.kernels.gpu.triton import narrow as triton_narrow

    sizes, options = _tile(weight, 1)
    y = weight.values.new_zeros((weight.n_rows, weight.shape[1]))
    kernel: Any = triton_narrow.dense[(weight.n_rows,)]
    kernel(weight.index, weight.values, y, weight.rows[0], weight.shape[1], *sizes, **options, **launch.FUSED)
    return y


def _columns(index: Tensor, n_values: int, shape: tuple[int, int]) -> Tensor:
    """Return the column of each value, int64."""
    windows = n_windows(shape[1])
    _, starts, bytes_ = sections.split(index, shape, windows + 1)
    window = torch.arange(windows, device=index.device).repeat(shape[0])
    windows_of = torch.repeat_interleave(window, starts.diff(dim=1).reshape(-1), output_size=n_values)
    return windows_of * WINDOW + bytes_.to(torch.int64)


def _tile(weight: Weight, tokens: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the sizes for both kernels, and a tile for a row: its lanes hold a usual window at once."""
    out, windows = weight.shape[0], n_windows(weight.shape[1])
    where = sections.layout(weight.shape, windows + 1)
    per_window = weight.values.numel() / (out * windows)
    steps = min(MAX_STEPS, MAX_SUMS // tokens, launch.power_of_2(round(per_window / LANES) or 1))
    tile = {"WINDOWS": min(WINDOWS_AT_ONCE, launch.power_of_2(windows)), "STEPS": steps, "LANES": LANES}
    sizes = (windows, where.starts_at, where.rest_at)
    return sizes, {**tile, "IS_WIDE": where.is_wide, "num_warps": 2 if tokens <= 2 else 4}

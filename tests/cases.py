"""Cases for tests and benchmarks: shapes, dtypes, patterns, masks, and the settings of hypothesis."""

from __future__ import annotations

import torch
from hypothesis import settings
from torch import Tensor

#: (out_features, in_features): one weight, one row, one column, odd, prime, and no multiple of any tile.
SHAPES = ((1, 1), (1, 7), (7, 1), (5, 3), (13, 17), (12, 8), (33, 260), (64, 48))

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Every kind of pattern; N:M and blocks fit only some shapes.
PATTERNS = ("unstructured", "rows", "columns", "2:4", "1:2", "4x1", "1x4", "3x2")

SPARSITIES = (0.0, 0.1, 0.25, 0.5, 0.9, 1.0)

#: The same examples in every run, and no failure because a machine is busy.
repeatable = settings(derandomize=True, deadline=None, max_examples=60)


def masks(shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return the masks that break naive code: all kept, none kept, an empty first row, an empty last column, half."""
    kept = torch.ones(shape, dtype=torch.bool)
    no_row, no_column = kept.clone(), kept.clone()
    no_row[0], no_column[:, -1] = False, False
    half = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return {"all": kept, "none": ~kept, "empty row": no_row, "empty column": no_column, "half": half}


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw a weight, the same in each run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

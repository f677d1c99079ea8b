"""The operand of the forms for GPUs: a packed weight, and the range of its rows in use."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Weight:
    """A packed weight of `shape` (out, in), limited to the rows from rows[0] to before rows[1]."""

    index: Tensor  # uint8
    values: Tensor
    shape: tuple[int, int]
    rows: tuple[int, int]

    @property
    def n_rows(self) -> int:
        """The number of rows asked for: of outputs."""
        return self.rows[1] - self.rows[0]

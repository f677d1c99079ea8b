"""Does a model calibrated on some data keep its outputs on other data? Cosines to the dense outputs on both."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsify.calibration.batches import Batch, read_example
from sparsify.calibration.eval_mode import eval_without_cache
from sparsify.errors import CarryOverWarning

#: Values of each batch's output that are compared.
N_VALUES = 2**22
#: A distance to the dense outputs this many times that inside the calibration data is far worse ...
_TIMES = 1.5
_SMALLEST = 0.02  # ... unless it is as small as this.


class DenseOutputs:
    """The outputs of a dense model on some batches, and the cosines of other models' outputs to them.

    Compared are the rows of the first float tensor of an output, those of padding left out where it has a row for each
    token.
    """

    @torch.inference_mode()
    def __init__(self, dense: nn.Module, data: Sequence[Any]) -> None:
        self.batches = [read_example(dense, batch) for batch in data]
        with eval_without_cache(dense):
            self.outputs = [_rows(dense, batch) for batch in self.batches]

    @torch.inference_mode()
    def cosine(self, model: nn.Module) -> float:
        """Return the mean cosine of a model's output rows with the dense ones."""
        with eval_without_cache(model):
            cosines = [
                F.cosine_similarity(_rows(model, batch), dense, dim=-1)
                for batch, dense in zip(self.batches, self.outputs, strict=True)
            ]
        return float(torch.cat(cosines).mean())


@dataclass(frozen=True)
class CarryOver:
    """Mean cosines of a model's outputs with the dense ones: on calibration data, and on other data by name."""

    inside: float
    outside: Mapping[str, float]

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {cosine:.3f}" for name, cosine in {"calibrated on": self.inside, **self.outside}.items()
        )

    @property
    def far_worse(self) -> list[str]:
        """The names of data with a distance of more than 1.5 times that of the calibration data, and over 0.02."""
        limit = max(_TIMES * (1 - self.inside), _SMALLEST)
        return [name for name, cosine in self.outside.items() if 1 - cosine > limit]

    def warn(self) -> None:
        """Warn of data with outputs far worse than the calibration data."""
        if names := self.far_worse:
            found = ", ".join(f"{self.outside[name]:.3f} on {name}" for name in names)
            warnings.warn(
                f"the outputs have a mean cosine to the dense ones of {self.inside:.3f} on the calibration data, and "
                f"of {found}; add data of that kind to the calibration, or prune less",
                CarryOverWarning,
                stacklevel=3,
            )


def carry_over(
    model: nn.Module, dense: nn.Module, inside: Iterable[Any], outside: Mapping[str, Iterable[Any]]
) -> CarryOver:
    """Compare a model with its dense form on the data it was calibrated on and on other data, and warn of a gap.

    inside: batches of the calibration data, as for `prune`; a few are enough
    outside: by name, batches of other data

    >>> import copy
    >>> model = sparsify.convert(nn.Sequential(nn.Linear(8, 4)))
    >>> dense = copy.deepcopy(model)
    >>> found = carry_over(model, dense, [torch.ones(2, 8)], {"other": [torch.zeros(2, 8)]})
    >>> round(found.inside, 3), round(found.outside["other"], 3)
    (1.0, 1.0)
    """
    if not outside:
        raise ValueError("no other data to compare on; give a mapping from names to batches")
    cosines = {}
    for name, batches in {"": inside, **outside}.items():
        if not (listed := list(batches)):
            raise ValueError(f"the data {name or 'of the calibration'} is empty; a generator read before is empty too")
        cosines[name] = DenseOutputs(dense, listed).cosine(model)
    found = CarryOver(cosines.pop(""), cosines)
    found.warn()
    return found


def _rows(model: nn.Module, batch: Batch) -> Tensor:
    """Return the rows of a model's output on a batch; a picture's are one row."""
    output = model(*batch.args, **batch.kwargs)
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    first = next((x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()), None)
    if first is None or first.ndim == 0 or first.numel() == 0:
        return torch.ones(1, 1)
    mask = next((mask for mask in batch.masks.values() if mask.shape == first.shape[:2] and first.ndim == 3), None)
    rows = first.flatten(1) if first.ndim == 4 else first.reshape(-1, first.shape[-1])
    rows = rows if mask is None else first[mask]
    return rows[: max(N_VALUES // max(rows.shape[1], 1), 1)].float()

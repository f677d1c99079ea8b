"""Stale masks: in a copy with weights written since, such as an average of weights, or overwritten in place.

An average of weights is a deep copy of the model, written by a training loop. Such loops know nothing of masks: the
copy's masks stay as they were, or become floats, so that every weight counts as kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sparsify.errors import StaleMaskWarning


class Origin(NamedTuple):
    """The original of a copied layer: its buffers with its present mask, and both layers at the time of copying.

    bits: the sum of the bits of the copy's weight; None after a change of the weight.
    n_kept: the number of weights kept by the original.
    """

    buffers: dict[str, Tensor | None]
    bits: int | None
    n_kept: int


def origins_of_copy(layer: Any) -> tuple[Origin, ...]:
    """Return the origins of a copy made of a masked layer now."""
    bits = bits_of(layer.weight)
    return () if bits is None else (*layer.origins, Origin(layer._buffers, bits, int(layer.mask.sum())))


def origins_after(origins: tuple[Origin, ...], before: int | None, weight: Tensor) -> tuple[Origin, ...]:
    """Return the origins after a move or cast, no change, of a weight with the bits `before` until then."""
    now = bits_of(weight)
    return tuple(origin._replace(bits=now if origin.bits == before else None) for origin in origins)


def bits_of(weight: Tensor) -> int | None:
    """Return the sum of a weight's bits, to notice a change by; None for a weight without readable memory."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or _get_current_dispatch_mode() is not None:
        return None
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().view(integers).sum())


def stale(layer: Any) -> str:
    """Return the sign of a stale mask in a layer, as a clause of a message; "" if there is none.

    Of a copy of a copy, the latest original with other masks than at the time of copying decides.
    """
    mask = layer.mask
    if mask.is_meta:
        return ""
    for buffers, bits, n_kept in reversed(layer.origins):
        latest = buffers.get("mask")
        if latest is None or latest.is_meta or bits == bits_of(layer.weight):
            continue
        if n_more := int((mask & ~latest.to(mask.device)).sum()):
            return f"its weight was written since it was copied, and it keeps {n_more:,} weights that its original lost"
        if int(latest.sum()) != n_kept:
            break
    if not layer.origins and layer.n_set is not None and (n_more := int(mask.sum()) - layer.n_set) > 0:
        return f"its mask was written over in place, and keeps {n_more:,} weights more than it was set to keep"
    return ""


def warn_stale(layers: Mapping[str, Any]) -> None:
    """Name the layers with stale masks in one StaleMaskWarning, with the way out."""
    reasons = {name: why for name, layer in layers.items() if (why := stale(layer))}
    if reasons:
        name, why = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more layers)" if len(reasons) > 1 else ""
        warnings.warn(
            f"{name or '(root)'}: {why}{more}. An average of weights needs the masks of the model that it is of: "
            "average.load_state_dict({key: value for key, value in model.state_dict().items() "
            "if value.dtype == torch.bool}, strict=False); a mask that is meant so is set with layer.set_mask",
            StaleMaskWarning,
            stacklevel=3,
        )

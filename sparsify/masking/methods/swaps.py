"""Swaps: a kept and a removed weight of a row change places where that lowers the error of the layer's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.masking.gram import add_damping
from sparsify.masking.patterns import Pattern

_CANDIDATES = 8  # kept weights of a row with the cheapest removal; each is tried against every removed one
_MAX_SWAPS = 400  # of a row
_ENTRIES = 2**22  # of one table of candidates
_SMALLEST = 1e-6  # of a row's output energy: a swap must gain more


def swap(
    target: Tensor, weight: Tensor, mask: Tensor, present: Tensor, pattern: Pattern, *, gram: Tensor, fit: bool
) -> tuple[Tensor, Tensor]:
    """Return a weight (out, in), float64, and mask with an error at most that of `weight` under `mask`.

    target: the weight whose outputs are wanted
    present: bool, False = removed before, to stay so
    pattern: unstructured, or N:M, where places change inside a group
    gram: the sum H of x xᵀ over the inputs x, (in, in)
    fit: give a weight that comes back its best value, instead of that in `target`

    With d = target - weight in one row, and g = H d: without a kept w_p the error d H d grows by 2 w_p g_p + w_p² H_pp,
    and g becomes g + w_p H_p. Then v at q lowers it by 2 v g_q - v² H_qq, at best by g_q² / H_qq. The best pair changes
    places, again and again, until none gains anything. Every row keeps as many weights as before.

    After Zimmer et al. 2025, arXiv:2512.10922, who let weights come back at their values in `target` only.
    """
    hessian = add_damping(gram)
    wanted, current, kept = target.detach().to(hessian), weight.detach().to(hessian).clone(), mask.clone()
    if kept.shape[1] < 2:
        return current, kept
    n_together = max(_ENTRIES // (_CANDIDATES * kept.shape[1]), 1)
    for rows in torch.arange(len(kept), device=kept.device).split(n_together):
        parts = (tensor[rows] for tensor in (wanted, current, kept, present))
        current[rows], kept[rows] = _swap_rows(*parts, pattern, hessian, fit)  # type: ignore[arg-type, call-arg]
    return current, kept


def _swap_rows(
    wanted: Tensor, weight: Tensor, kept: Tensor, present: Tensor, pattern: Pattern, hessian: Tensor, fit: bool
) -> tuple[Tensor, Tensor]:
    """Swap in some rows until no pair gains anything."""
    single, sizes = hessian.float(), hessian.diagonal()
    slope = (wanted - weight) @ hessian
    least = _SMALLEST * ((wanted @ hessian) * wanted).sum(1)
    active = torch.arange(len(kept), device=kept.device)
    for _ in range(_MAX_SWAPS):
        here, places, rest = weight[active], kept[active], slope[active]
        removal = (2 * here * rest + here.square() * sizes).masked_fill_(~places, torch.inf)
        costs, cheapest = removal.topk(min(_CANDIDATES, kept.shape[1]), dim=1, largest=False)
        values = here.gather(1, cheapest)
        after = rest.float()[:, None] + values.float()[:, :, None] * single[cheapest]  # (rows, candidates, in)
        if fit:
            gains = after.square() / sizes.float()
        else:
            gains = wanted[active].float()[:, None] * (2 * after - (wanted[active] * sizes).float()[:, None])
        gains = gains.masked_fill_((places | ~present[active])[:, None], -torch.inf)
        if pattern.is_nm:
            group = torch.arange(kept.shape[1], device=kept.device) // pattern.group
            gains = gains.masked_fill_(group != (cheapest // pattern.group)[:, :, None], -torch.inf)
        best, pair = (gains - costs.float()[:, :, None]).flatten(1).max(1)
        gaining = best > least[active]
        if not bool(gaining.any()):
            break
        active, pair = active[gaining], pair[gaining]
        out = cheapest[gaining].gather(1, (pair // kept.shape[1])[:, None])[:, 0]
        back = pair % kept.shape[1]
        _exchange(wanted, weight, kept, slope, hessian, (active, out, back), fit)
    return weight, kept


def _exchange(
    wanted: Tensor,
    weight: Tensor,
    kept: Tensor,
    slope: Tensor,
    hessian: Tensor,
    places: tuple[Tensor, Tensor, Tensor],
    fit: bool,
) -> None:
    """Remove one weight of each of some rows, and bring one back, in place."""
    rows, out, back = places
    slope[rows] += weight[rows, out, None] * hessian[out]
    weight[rows, out], kept[rows, out] = 0.0, False
    value = slope[rows, back] / hessian[back, back] if fit else wanted[rows, back]
    slope[rows] -= value[:, None] * hessian[back]
    weight[rows, back], kept[rows, back] = value, True

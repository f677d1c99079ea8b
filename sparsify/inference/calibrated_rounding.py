"""Rounding to int8 by a layer's inputs: weights that are still to be rounded make up for those rounded before."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.csr import dense_to_csr
from sparsify.kernels.int8 import LARGEST, Rounded, quantize
from sparsify.masking.gram import add_damping
from sparsify.masking.methods.sparsegpt import BLOCK, inverse_factor


def round_by_inputs(weight: Tensor, mask: Tensor, rows: Tensor) -> Rounded:
    """Round the kept weights of a layer (out, in) so that its outputs on these rows (n, in) change little.

    Columns are rounded one by one, those with the largest inputs first; each error is made up for by the columns still
    to come, as SparseGPT does for removed weights. Scales are those of `quantize`. Raises ValueError for a kept weight
    that is NaN or Inf.

    Frantar et al. 2023, arXiv:2210.17323 (GPTQ).
    """
    _, scale = quantize(dense_to_csr(weight, mask), len(weight))
    _, exponent = torch.frexp(rows.abs().max())
    rows = torch.ldexp(rows, -exponent)  # squares of large inputs are finite, too
    gram = (rows.T @ rows).double()
    order = gram.diagonal().argsort(descending=True)
    upper = inverse_factor(add_damping(gram[order][:, order])).float()
    columns = (weight.detach().float() / scale[:, None]).T[order]  # a column of the weight is a row here
    kept, values = mask.T[order], torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
    columns.masked_fill_(~kept, 0)
    for start in range(0, len(columns), BLOCK):
        block, factor = columns[start : start + BLOCK], upper[start : start + BLOCK, start : start + BLOCK]
        errors = torch.empty_like(block)
        for j in range(len(block)):
            rounded = block[j].round().clamp_(-LARGEST, LARGEST).mul_(kept[start + j])
            values[start + j] = rounded.to(torch.int8)
            errors[j] = (block[j] - rounded) / factor[j, j]
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        columns[start + BLOCK :].addmm_(upper[start : start + BLOCK, start + BLOCK :].T, errors, alpha=-1)
    return Rounded(values[order.argsort()].T[mask], scale)

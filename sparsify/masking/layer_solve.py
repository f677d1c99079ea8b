"""One layer on its calibration data: the new weight and mask, and the change of its outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.masking.gram import Gram, add_damping
from sparsify.masking.methods.refit import refit
from sparsify.masking.methods.registry import BY_ROW, SOLVERS, Method, takes
from sparsify.masking.methods.scoring import check_finite, score
from sparsify.masking.methods.swaps import swap
from sparsify.masking.patterns import choose_mask
from sparsify.masking.spec import LayerSpec

_BLOCK = 256  # columns of one product, so that half of a symmetric matrix is left out


def prune_layer(name: str, weight: Tensor, mask: Tensor, spec: LayerSpec, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's new weight and mask, from the present ones (out, in) and its inputs' Gram matrix (in, in).

    With a Gram matrix for each group of rows, (n_groups, in, in), scores are ranked over the whole layer, and a solver
    prunes group by group: each group loses what `spec.of_matrices` says, else all as many units, and if that does not
    come out even, the last ones one more.
    Raises ValueError, naming the layer, if a solver's pattern has units over several groups.
    """
    check_finite(name, weight)
    present, weight = mask, weight.detach().masked_fill(~mask, 0)
    if spec.method in SOLVERS:
        new, mask = _solve(name, weight, mask, spec, gram)
    else:
        scores = layer_scores(name, weight, spec.method, spec.seed, gram)
        by_row, counts = spec.method in BY_ROW, spec.of_matrices or (spec.n_removed,)
        parts = zip(scores.chunk(len(counts)), mask.chunk(len(counts)), counts, strict=True)
        mask = torch.cat([choose_mask(part, kept, spec.pattern, n, by_row=by_row) for part, kept, n in parts])
        new = weight.masked_fill(~mask, 0)
    grams = as_groups(gram)
    if spec.swap:
        fit = spec.refit or spec.method in SOLVERS
        tensors = (tensor.chunk(len(grams)) for tensor in (weight, new, mask, present))
        pairs = [swap(*part, spec.pattern, gram=own, fit=fit) for *part, own in zip(*tensors, grams, strict=True)]  # type: ignore[arg-type, misc]
        new, mask = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    if spec.refit:
        parts = zip(weight.chunk(len(grams)), mask.chunk(len(grams)), grams, strict=True)
        new = torch.cat([refit(part, kept, gram=own) for part, kept, own in parts])  # type: ignore[arg-type]
    return new, mask


def layer_scores(name: str, weight: Tensor, method: str | Method, seed: int | None, gram: Tensor) -> Tensor:
    """Score a layer's weight (out, in), each group of rows by its own Gram matrix."""
    if gram.dim() == 2 or not takes(method, "gram"):
        return score(name, weight, method, seed, gram)
    return torch.cat(
        [score(name, part, method, seed, own) for part, own in zip(weight.chunk(len(gram)), gram, strict=True)]
    )


def as_groups(gram: Tensor) -> Tensor:
    """Return Gram matrices as (n_groups, in, in)."""
    return gram if gram.dim() == 3 else gram.unsqueeze(0)


def _solve(name: str, weight: Tensor, mask: Tensor, spec: LayerSpec, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Let a solver prune a layer, group by group."""
    assert isinstance(spec.method, str)
    solver, grams = SOLVERS[spec.method], as_groups(gram)
    n_groups, pattern = len(grams), spec.pattern
    if n_groups == 1:
        return solver(weight, mask, spec.n_removed, pattern, gram=grams[0])
    shape = (weight.shape[0] // n_groups, weight.shape[1])
    if shape[0] % max(pattern.unit_shape(shape)[0], 1) or n_groups * pattern.n_units(shape) != pattern.n_units(
        weight.shape
    ):
        raise ValueError(
            f"{name}: method {spec.method!r} prunes a layer with groups group by group, and pattern {pattern.text} has "
            f"units over several groups of {shape[0]} rows; use method 'wanda' or pattern 'unstructured'"
        )
    results = []
    parts = zip(weight.chunk(n_groups), mask.chunk(n_groups), grams, strict=True)
    for number, (part, kept, own) in enumerate(parts):
        n_removed = spec.n_removed // n_groups + (number >= n_groups - spec.n_removed % n_groups)
        n_removed = spec.of_matrices[number] if spec.of_matrices else n_removed
        results.append(solver(part, kept, n_removed, pattern, gram=own))
    weights, masks = zip(*results, strict=True)
    return torch.cat(weights), torch.cat(masks)


def weight_for_dense_outputs(weight: Tensor, gram: Gram) -> Tensor:
    """Return the W' least in ||W' x - W d||: the outputs on present inputs x match those on the dense model's inputs d.

    Least squares, damped as in refit: W' = W (C + aI) (G + aI)⁻¹ for the sums G of x xᵀ and C of d xᵀ. A layer outside
    of a chain, without dense inputs, aims at its weight.

    Li et al. 2025, arXiv:2504.02692 (asymmetric calibration), here in closed form.
    """
    if gram.cross is None:
        return weight
    aimed = []
    matrices = as_groups(gram.matrix)
    for part, matrix, cross in zip(weight.detach().chunk(len(matrices)), matrices, as_groups(gram.cross), strict=True):
        hessian = add_damping(matrix)
        wanted = part.to(hessian) @ (cross + hessian - matrix)
        aimed.append(torch.cholesky_solve(wanted.T, torch.linalg.cholesky(hessian)).T)
    return torch.cat(aimed)


def output_error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """Return the norm of the change of a layer's outputs over all data, relative to the norm of the outputs.

    0 without a change, and for outputs of zeros.

    >>> output_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]), torch.eye(2))
    0.8
    """
    change, total = (_energy(matrix.to(gram), gram) for matrix in (weight.detach().to(gram) - new.to(gram), weight))
    return math.sqrt(max(change, 0.0) / total) if total > 0 else 0.0


def _energy(weight: Tensor, gram: Tensor) -> float:
    """Return the sum of w G w over the rows w; entries above the diagonal of the symmetric G count twice."""
    if gram.dim() == 3:
        return sum(_energy(part, own) for part, own in zip(weight.chunk(len(gram)), gram, strict=True))
    weight, total = weight.detach(), torch.zeros((), dtype=gram.dtype, device=gram.device)
    for start in range(0, len(gram), _BLOCK):
        part, rest = weight[:, start : start + _BLOCK], weight[:, start:]
        products = part @ gram[start : start + _BLOCK, start:]
        total += 2 * (products * rest).sum() - (products[:, : part.shape[1]] * part).sum()
    return float(total)

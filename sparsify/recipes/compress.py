"""The verb for the common case: a dense model pruned and exported in one call."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sparsify.conversion.convert import convert
from sparsify.conversion.module_surgery import Model
from sparsify.inference.export import check_format, export
from sparsify.inference.rounding import MAX_ERROR, MAX_INPUT_ERROR
from sparsify.layer_names import Selector
from sparsify.layers import MaskedLayer, PackedLayer
from sparsify.masking.methods.registry import Method
from sparsify.masking.spec import Allocation
from sparsify.pruning.prune import prune
from sparsify.pruning.reconstruct import Reconstruction
from sparsify.recipes.apply import apply, check_applicable
from sparsify.recipes.assignment import assign_layers, convert_by_recipe
from sparsify.recipes.schema import Recipe

#: The options of a pruning that say nothing.
_DEFAULTS = ("unstructured", "uniform")


def compress(
    model: Model,
    sparsity: float | None = None,
    *,
    data: Iterable[Any] | None = None,
    example: Any = None,
    recipe: Recipe | None = None,
    method: str | Method | None = None,
    pattern: str = "unstructured",
    allocation: Allocation = "uniform",
    refit: bool = False,
    correct: bool = False,
    swap: bool = False,
    reconstruct: int | Reconstruction | None = None,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    types: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
    tied: str = "error",
    functional: bool = False,
    format: str = "auto",
    prefer: str = "speed",
    device: torch.device | str | None = None,
    quantize: str | None = None,
    max_error: float = MAX_ERROR,
    max_input_error: float = MAX_INPUT_ERROR,
    quantize_rest: bool = False,
    seed: int | None = None,
    cache_bytes: int | None = None,
    progress: bool = False,
    copy: bool = True,
) -> Model:
    """Return a pruned and exported copy of a dense model, in eval mode: `convert`, `prune` and `export` in one call.

    `report` of the result has each layer's sparsity, form, bytes and error, and `save` writes it. The model itself
    stays as it was; copy=False changes it instead, with a third of the memory.

    sparsity: fraction of zeros of each layer, 0 to 1; left out if the recipe, the pattern or an allocation says it.
    data: calibration batches, as for `prune`; read once, into memory. Without it magnitudes decide.
    example: a typical input, as for `export`; without one the first batch of the data, if there is any.
    recipe: groups of layers with options of their own, in place of sparsity and all options down to exclude.
    method: as for `prune`; with data "sparsegpt" unless said, without "magnitude".
    The other options are those of `convert`, `prune` and `export`.

    Raises ValueError for whatever these three refuse.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> fast = compress(model, 0.75, data=[torch.randn(100, 64)], format="csr")
    >>> [round(row.sparsity, 2) for row in sparsify.report(fast)], type(model[0]).__name__
    ([0.75, 0.75], 'Linear')
    """
    quantize = quantize or (recipe.quantize if recipe is not None else None)
    check_format(format, quantize=quantize)
    _check_dense(model)
    batches = None if data is None else list(_read_once(data))
    conversion: dict[str, Any] = {"tied": tied, "functional": functional}
    selection: dict[str, Any] = {"include": include, "exclude": exclude, "types": types}
    pruning: dict[str, Any] = {"sparsity": sparsity, "method": method, "pattern": pattern, "allocation": allocation}
    pruning |= {"seed": seed, "refit": refit, "correct": correct, "swap": swap, "reconstruct": reconstruct}
    given = [key for key, value in (pruning | selection).items() if value not in (None, False, *_DEFAULTS)]
    if recipe is not None:
        if given:
            raise ValueError(f"{given[0]!r} has no effect beside a recipe; say it in the recipe's groups")
        check_applicable(recipe, has_data=batches is not None)
        assign_layers(recipe, model)
    model = copying.deepcopy(model) if copy else model
    model.eval()
    if recipe is not None:
        convert_by_recipe(model, recipe, **conversion)
        apply(model, recipe, data=batches, cache_bytes=cache_bytes, progress=progress)
    else:
        convert(model, **selection, **conversion)
        pruning["method"] = method or ("magnitude" if batches is None else "sparsegpt")
        prune(model, **pruning, data=batches, cache_bytes=cache_bytes, progress=progress and batches is not None)
    if (format == "auto" or quantize) and example is None and batches:
        example = batches[0]
    rounding: dict[str, Any] = {"quantize": quantize, "max_error": max_error, "quantize_rest": quantize_rest}
    rounding["max_input_error"] = max_input_error
    form: dict[str, Any] = {"format": format, "example": example, "prefer": prefer, "device": device}
    return export(model, **form, **rounding, progress=progress, copy=False)


def _read_once(data: Iterable[Any]) -> Iterator[Any]:
    if isinstance(data, (torch.Tensor, dict)):
        raise ValueError(f"data is one {type(data).__name__}; give the batches in a list: data=[batch]")
    yield from data


def _check_dense(model: nn.Module) -> None:
    """Raise ValueError for a model with masked or exported layers, which this verb would prune a second time."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            raise ValueError(f"{name or '(root)'}: already exported; start from the dense model, or to_dense(model)")
        if isinstance(module, MaskedLayer):
            raise ValueError(f"{name or '(root)'}: already converted; go on with prune(model, ...) and export(model)")

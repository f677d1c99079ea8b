"""Modules whose own code multiplies with packed weights, measured as a whole: LSTMs and their like, cells and experts.

With a packed weight they run product by product, where torch and transformers have operators for all products at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.batches import read_example
from sparsify.calibration.layer_inputs import layer_inputs, run_watched
from sparsify.conversion.module_surgery import copy_replacing, layers_of_type
from sparsify.hardware.timing import Call
from sparsify.inference.form_selection import FormSelector, exported_as
from sparsify.layers.functional_module import Functional
from sparsify.layers.held_weight import CSRHeldWeight, SparseHeldWeight
from sparsify.layers.records import MARGIN, FormChoice, form_choice, set_form_choice

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

#: Positional and keyword arguments.
_Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


def inputs_of_recurrent(model: nn.Module, given: Mapping[nn.Module, Tensor], tokens: int) -> dict[nn.Module, Tensor]:
    """Return the inputs of the layers in LSTMs and their like that have none in `given`.

    They are those of one sequence of `tokens` steps; of as many rows for a cell.
    """
    found: dict[nn.Module, Tensor] = {}
    for module in layers_of_type(model, Functional).values():
        held = _held(module)
        if isinstance(module, _RECURRENT) and held and not any(layer in given for layer in held):
            found |= layer_inputs(module, _sequence(module, tokens))
    return found


def dense_where_faster(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module], example: Any, selector: FormSelector
) -> dict[nn.Module, nn.Module]:
    """Return dense layers for the packed ones of modules that are no faster with them.

    On the CPU each module is timed in both ways, on its arguments in one run of the example. Without a call there,
    recurrent modules get a sequence of `selector.tokens` steps, and experts keep the choices of their layers. The form
    choices of the layers get the times of the module. On other devices they are dense.
    """
    modules = [m for m in layers_of_type(model, Functional).values() if _packed(m, replacements)]
    arguments = {} if example is None or not modules else _arguments(model, modules, example)
    dense: dict[nn.Module, nn.Module] = {}
    for module in modules:
        if isinstance(module, _RECURRENT):
            arguments.setdefault(module, (_sequence(module, selector.tokens), {}))
        if module not in arguments:
            continue
        plain: dict[nn.Module, nn.Module] = {layer: exported_as(layer, "dense") for layer in _held(module)}
        packed = {layer: replacements[layer] for layer in plain}
        both_ways = {"dense": plain, "packed": packed}
        on_cpu = _held(module)[0].weight.is_cpu  # elsewhere all products at once are one launch
        calls = {name: _call(module, layers, arguments[module]) for name, layers in both_ways.items() if on_cpu}
        times = selector.times(calls) if calls else {}
        slower = not times or times["packed"] >= MARGIN * times["dense"]
        for layer in _packed(module, replacements):
            choice = form_choice(replacements[layer])
            assert choice is not None
            both = {"dense": times["dense"], choice.form: times["packed"]} if times else {}
            chosen = FormChoice("dense" if slower else choice.form, choice.tokens, both, choice.machine)
            set_form_choice(plain[layer] if slower else replacements[layer], chosen)
        dense |= plain if slower else {}
    for held, made in dense.items():
        if form_choice(made) is None:
            choice = form_choice(replacements[held])
            assert choice is not None
            set_form_choice(made, choice)
    return dense


def _held(module: nn.Module) -> list[SparseHeldWeight]:
    return [layer for layer in module._modules.values() if isinstance(layer, SparseHeldWeight)]


def _packed(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> list[SparseHeldWeight]:
    return [layer for layer in _held(module) if isinstance(replacements.get(layer), CSRHeldWeight)]


def _sequence(module: nn.Module, tokens: int) -> tuple[Tensor]:
    """Return random inputs of a recurrent module: one sequence, or rows for a cell."""
    weight = next(iter(_held(module))).weight
    size: Any = module.input_size
    shape: tuple[int, ...] = (tokens, size)
    if isinstance(module, nn.RNNBase):
        shape = (1, tokens, size) if module.batch_first else (tokens, 1, size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return (x.to(weight),)


def _arguments(model: nn.Module, modules: list[Functional], example: Any) -> dict[nn.Module, _Arguments]:
    """Run the model on an example, and return the arguments of each module's first call."""
    found: dict[nn.Module, _Arguments] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(module, (args, kwargs))

    run_watched(model, read_example(model, example), modules, before)
    return found


def _call(module: nn.Module, layers: Mapping[nn.Module, nn.Module], arguments: _Arguments) -> Call:
    """Return a call of the module's copy with these layers."""
    made, (args, kwargs) = copy_replacing(module, dict(layers), share_memory=True).eval(), arguments
    return lambda: made.forward(*args, **kwargs)

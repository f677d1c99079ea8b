"""The inputs of a model's layers in one run on an example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsify.calibration.batches import Batch, read_example
from sparsify.calibration.block_call import first_tensor
from sparsify.calibration.eval_mode import eval_without_cache
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.layers import MaskedLayer


def layer_inputs(
    model: nn.Module, example: Any, look: Callable[[nn.Module, Tensor], None] | None = None
) -> dict[nn.Module, Tensor]:
    """Run a model once, and return each masked layer's input: shape, layout and dtype, on the meta device.

    example: a tensor, a tuple of positional arguments, or a dict of keyword arguments
    look: called with each layer and each of its inputs, as they come

    Of several inputs of a layer, the largest is here; a layer without a call has none. A call of F.linear with a
    layer's weight counts as a call of the layer. The model runs in eval mode, without gradients. Raises ValueError if
    the model does not run on the example.

    >>> model = sparsify.convert(nn.Sequential(nn.Linear(8, 4)))
    >>> [x.shape for x in layer_inputs(model, torch.ones(5, 8)).values()]
    [torch.Size([5, 8])]
    """
    inputs: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, x: Tensor) -> None:
        if look is not None:
            look(layer, x)
        if layer not in inputs or x.numel() > inputs[layer].numel():
            inputs[layer] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record(layer, first_tensor(args, kwargs))

    layers = layers_of_type(model, MaskedLayer).values()
    batch = read_example(model, example)
    try:
        with _LinearCalls({id(layer.weight): layer for layer in layers}, record):
            run_watched(model, batch, layers, before)
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"the model does not run on the example: {type(error).__name__}: {error}") from error
    return inputs


def run_watched(
    model: nn.Module,
    batch: Batch,
    modules: Iterable[nn.Module],
    before: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
) -> None:
    """Run a model once in eval mode, without gradients; `before` sees each call of the modules and its arguments."""
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        with eval_without_cache(model), torch.no_grad():
            model(*batch.args, **batch.kwargs)
    finally:
        for handle in handles:
            handle.remove()


class _LinearCalls(TorchFunctionMode):
    """A mode that records the inputs of F.linear with the weight of a layer, without a call of the layer."""

    def __init__(self, layers: Mapping[int, nn.Module], record: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.layers, self.record = layers, record

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.linear:
            named = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
            if id(named["weight"]) in self.layers:
                self.record(self.layers[id(named["weight"])], named["input"])
        return func(*args, **kwargs)

"""The multiply-adds of one run of a model, by the weights that they use."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.calibration.batches import read_example
from sparsify.calibration.eval_mode import eval_without_cache
from sparsify.layers import PackedLayer


class _Counter(TorchDispatchMode):
    """Sums of the multiply-adds of all operators, by the memory of the Parameter used, 0 for none."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # a third of a second, for this alone

        self.formulas = flop_registry
        self.known = {memory_of(p): memory_of(p) for p in parameters}
        self.counts: Counter[int] = Counter()
        self.kept: list[Tensor] = []
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        flops = self.formulas.get(func._overloadpacket)
        if flops is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        tensors = sorted((a for a in args if isinstance(a, Tensor)), key=lambda tensor: tensor.ndim)
        used = [self.known[m] for tensor in reversed(tensors) if (m := memory_of(tensor)) in self.known]  # weight, bias
        if flops is not None:
            self.counts[used[0] if used else 0] += flops(*args, **kwargs, out_val=result) // 2
        elif used and func._overloadpacket is torch.ops.aten.where:  # a masked weight
            self.kept.append(result)  # while it lives, its memory is no other's
            self.known[memory_of(result)] = used[0]
        return result


@torch.no_grad()
def multiply_adds(model: nn.Module, example: Any) -> Counter[int]:
    """Run the model on an example, and return the multiply-adds by the memory of the weight used (`memory_of`).

    An exported layer counts as its dense form, under the memory of its `values`. Products without a weight are under 0.
    The model runs in eval mode. Raises ValueError if the model does not run on the example.
    """
    batch = read_example(model, example)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operator would hide its products
    try:
        counter = _Counter(model.parameters())
        with eval_without_cache(model), _packed_layers(model, counter), _lstms_as_products(model), counter:
            model(*batch.args, **batch.kwargs)
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"the model does not run on the example: {type(error).__name__}: {error}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.counts


@contextlib.contextmanager
def _lstms_as_products(model: nn.Module) -> Iterator[None]:
    """Keep oneDNN, with one operator for a whole LSTM, from a model with any: its products are seen one by one."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(before and not any(isinstance(module, nn.RNNBase) for module in model.modules()))
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextlib.contextmanager
def _packed_layers(model: nn.Module, counter: _Counter) -> Iterator[None]:
    """Count the multiply-adds of exported layers, in_features for each output, and not the products inside them."""

    def before(layer: nn.Module, args: Any) -> None:
        counter.paused = True

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        counter.paused = False
        assert isinstance(layer, PackedLayer)
        counter.counts[memory_of(layer.values)] += math.prod(output.shape) * layer.in_features

    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def memory_of(tensor: Tensor) -> int:
    """Return a number for the memory behind a tensor, on any device, the meta device included."""
    return int(tensor.untyped_storage()._cdata)

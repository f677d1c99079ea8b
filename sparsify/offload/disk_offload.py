"""Offload to disk: each weight of a model is read when its module runs, and dropped when others need the room."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from sparsify.checkpoint.dense_weights import check_dtype
from sparsify.checkpoint.weight_codec import decode_weight
from sparsify.hardware.allocator import return_freed_memory
from sparsify.layer_names import join
from sparsify.layers import MaskedLayer
from sparsify.offload.journal import Journal
from sparsify.offload.lazy_safetensors import LazySafetensors

_READ_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # types with reads of their children's weights


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build models with Parameters on the meta device, without memory; buffers are real.

    `torch.device("meta")` would lose the values of buffers outside of any file, such as rotary frequencies. Models
    built by other threads meanwhile are as ever.
    """
    thread = threading.get_ident()
    twins = WeakIdKeyDictionary()  # a Parameter in two modules stays one

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        if parameter not in twins:
            twins[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        twin: nn.Parameter = twins[parameter]
        return twin

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


class DiskOffload:
    """Hooks that give a model on the meta device its weights, module by module, as it runs.

    model: built `parameters_on_meta` and converted. After this call its Parameters and masks are on the CPU. Those in
    memory take at most `budget_bytes`, or the bytes of one module; the others hold NaN. A layer in the journal comes
    from there, with its mask; with `dense` only once it is taken over. `close` takes the hooks away.

    Raises ValueError if the file is not for this model.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: LazySafetensors,
        journal: Journal | None,
        budget_bytes: int,
        *,
        dense: bool = False,
    ) -> None:
        self.model, self.weights, self.journal, self.budget_bytes = model, weights, journal, budget_bytes
        self.n_bytes, self.peak_bytes = 0, 0
        self._taken = set(() if journal is None or dense else journal.finished)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._in_use: OrderedDict[int, Callable[[], int]] = OrderedDict()
        self._keys = _make_placeholders(model, weights, _keys(model, weights))
        self._hooks = [module.register_forward_pre_hook(self._before) for module in model.modules() if _own(module)]

    def close(self) -> None:
        """Take the hooks away; the weights in memory stay there."""
        for hook in self._hooks:
            hook.remove()

    def fetch(self, module: nn.Module) -> None:
        """Read a module's own Parameters and mask into memory, unless they are there."""
        modules = module.modules() if isinstance(module, _READ_WHOLE) else (module,)
        needed = [(owner, key, parameter) for owner in modules for key, parameter in _own(owner)]
        for _, _, parameter in needed:
            if id(parameter) in self._in_use:
                self._in_use.move_to_end(id(parameter))
        keep = {id(parameter) for _, _, parameter in needed}
        for owner, key, parameter in needed:
            if id(parameter) not in self._in_use:
                self._make_room(_n_bytes(owner, key, parameter), keep)
                self._load(owner, key, parameter)

    @property
    def finished(self) -> list[str]:
        """The names of the layers in the journal."""
        return [] if self.journal is None else self.journal.finished

    def take_over(self, name: str, layer: MaskedLayer) -> None:
        """Read a finished layer from the journal from now on."""
        self._taken.add(name)
        for _, parameter in _own(layer):
            if id(parameter) in self._in_use:
                self.n_bytes -= self._in_use.pop(id(parameter))()

    def write(self, layers: Mapping[str, MaskedLayer]) -> None:
        """Put finished layers into the journal, for every later read of them."""
        assert self.journal is not None
        self.journal.write(layers)
        self._taken.update(layers)

    def _before(self, module: nn.Module, args: object) -> None:
        self.fetch(module)

    def _make_room(self, n_bytes: int, keep: set[int]) -> None:
        n_before = len(self._in_use)
        for old in [key for key in self._in_use if key not in keep]:
            if self.n_bytes + n_bytes <= self.budget_bytes:
                break
            self.n_bytes -= self._in_use.pop(old)()
        if len(self._in_use) < n_before:
            return_freed_memory()

    @torch.no_grad()
    def _load(self, module: nn.Module, key: str, parameter: nn.Parameter) -> None:
        name = self._names[id(module)]
        masked = isinstance(module, MaskedLayer) and key == "weight"
        n_bytes = _n_bytes(module, key, parameter)
        if self.journal is not None and name in self._taken and isinstance(module, MaskedLayer):
            entry, tensors = self.journal.read(name)
            if masked:
                weight, mask = decode_weight(entry, tensors)
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                parameter.data.copy_(module.as_weight(weight))
                module.mask = torch.ones_like(parameter, dtype=torch.bool, memory_format=torch.contiguous_format)
                module.set_mask(mask)
            else:
                parameter.data = tensors[key]
        else:
            parameter.data = self.weights.read(self._keys[id(parameter)])
            if isinstance(module, MaskedLayer) and masked:
                module.mask = torch.ones_like(parameter, dtype=torch.bool, memory_format=torch.contiguous_format)
        self.n_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.n_bytes)

        def drop() -> int:
            parameter.data = _placeholder(parameter)
            if isinstance(module, MaskedLayer) and masked:
                module.mask = _placeholder(module.mask, fill=True)
            return n_bytes

        self._in_use[id(parameter)] = drop


def named_tensors(model: nn.Module, weights: LazySafetensors | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the Parameters and buffers of a converted model before it is pruned, one at a time, without masks.

    weights: the source of the Parameters, of a model built `parameters_on_meta`.
    """
    keys = None if weights is None else _keys(model, weights)
    masks = {id(module.mask) for module in model.modules() if isinstance(module, MaskedLayer)}
    for name, parameter in model.named_parameters():
        yield name, parameter if weights is None or keys is None else weights.read(keys[id(parameter)])
    for name, buffer in model.named_buffers():
        if id(buffer) not in masks:
            yield name, buffer if weights is None or name not in weights else weights.read(name)


def parameter_bytes(model: nn.Module, weights: LazySafetensors | None) -> dict[int, int]:
    """Return the bytes of each Parameter, by its id; of a Parameter on disk, as it is there."""
    if weights is None:
        return {id(parameter): parameter.nbytes for parameter in model.parameters()}
    keys = _keys(model, weights)
    return {id(p): p.numel() * weights.dtype(keys[id(p)]).itemsize for p in model.parameters()}


def largest_block_bytes(model: nn.Module) -> int:
    """Return the bytes, weights and masks, of the largest part of a model to hold in memory at once.

    Parts are the children of each nn.ModuleList and nn.Sequential, and each module with the tensors of its own.
    """
    blocks = [child for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) for child in m.children()]
    owners = [sum(_n_bytes(m, key, p) for key, p in _own(m)) for m in model.modules()]
    whole = [sum(_n_bytes(m, key, p) for m in block.modules() for key, p in _own(m)) for block in blocks]
    return max([*owners, *whole], default=0)


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(key, parameter) for key, parameter in module._parameters.items() if parameter is not None]


def _n_bytes(module: nn.Module, key: str, parameter: nn.Parameter) -> int:
    """Return the bytes of a Parameter with its mask."""
    n = parameter.numel()
    return n * parameter.element_size() + (n if isinstance(module, MaskedLayer) and key == "weight" else 0)


def _keys(model: nn.Module, weights: LazySafetensors) -> dict[int, str]:
    """Return the name of each Parameter in the file, by its id: one of its names in the model."""
    keys: dict[int, str] = {}
    missing: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in weights:
            missing.setdefault(id(parameter), name)
        elif id(parameter) not in keys:
            _check_fits(weights, name, parameter)
            keys[id(parameter)] = name
    if lost := [name for identity, name in missing.items() if identity not in keys]:
        raise ValueError(f"{weights.path}: not for this model: it lacks {len(lost)} of its Parameters {lost[:3]}")
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if odd := [name for name in weights if name not in known]:
        raise ValueError(f"{weights.path}: not for this model: {len(odd)} tensors are too many {odd[:3]}")
    return keys


def _check_fits(weights: LazySafetensors, name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor of the file has another shape or kind of value than that of the model."""
    if weights.shape(name) != tuple(tensor.shape):
        raise ValueError(
            f"{weights.path}: {name} is {weights.shape(name)} in the file, {tuple(tensor.shape)} in the model"
        )
    check_dtype(weights.path, name, weights.dtype(name), tensor.dtype)


def _make_placeholders(model: nn.Module, weights: LazySafetensors, keys: dict[int, str]) -> dict[int, str]:
    """Turn meta Parameters and masks into tensors without memory on the CPU, and read the buffers.

    Returns the names in the file by the new Parameters.
    """
    old = list(model.parameters())  # alive until the end: no new one gets the id of an old one
    placeholders: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in _own(module):
            if id(parameter) not in placeholders:
                dtype = weights.dtype(keys[id(parameter)])
                placeholders[id(parameter)] = nn.Parameter(_placeholder(parameter, dtype), requires_grad=False)
            module._parameters[key] = placeholders[id(parameter)]
        if isinstance(module, MaskedLayer):
            module.mask = _placeholder(module.mask, fill=True)
        for key, buffer in module._buffers.items():
            full = join(name, key)
            if buffer is not None and full in weights:
                _check_fits(weights, full, buffer)
                module._buffers[key] = weights.read(full)
    return {id(placeholders[id(parameter)]): keys[id(parameter)] for parameter in old}


def _placeholder(tensor: Tensor, dtype: torch.dtype | None = None, *, fill: float | bool = math.nan) -> Tensor:
    """Return a tensor of the same shape without memory: one value for all of it."""
    dtype = dtype or tensor.dtype
    return torch.full((), fill if dtype.is_floating_point else bool(fill), dtype=dtype, device="cpu").expand(
        tensor.shape
    )

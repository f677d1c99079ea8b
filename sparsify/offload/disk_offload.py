"""A model whose weights stay on disk: each is read when its module runs, and dropped when others need the room."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from sparsify.checkpoint.dense_weights import check_dtype, check_values
from sparsify.checkpoint.tensor_file import TensorFile
from sparsify.checkpoint.weight_codec import decode_weight
from sparsify.layers import MaskedLayer
from sparsify.offload.journal import Journal

_READ_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they read the weights of their children


class LazySafetensors:
    """The tensors of a safetensors file, or of a folder of them with an index, read one at a time.

    All files are opened at once, and stay the same ones if others are put in their place. Raises ValueError for a
    folder without such files, or if another program writes into one; OSError for a path that is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        opened = {file: TensorFile(file) for file in self._find()}
        for file, tensors in opened.items():
            if not tensors.is_at(file):  # some of the others may be of the new ones, and some of the old
                raise ValueError(f"{file}: another program replaced it while the weights were being opened; try again")
        self._places: dict[str, tuple[TensorFile, str]] = {}  # the file, and the name there
        for tensors in opened.values():
            if twice := [name for name in tensors if name in self._places]:
                others = self._places[twice[0]][0].path, tensors.path
                raise ValueError(f"{self.path}: {twice[0]} is in two files, {others[0]} and {others[1]}; take one away")
            self._places |= {name: (tensors, name) for name in tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> Tensor:
        """Read a tensor into memory of its own."""
        file, name_there = self._places[name]
        tensor = file.read(name_there)
        check_values(file.path, name_there, tensor)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading it."""
        file, name_there = self._places[name]
        return file.dtype(name_there)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        file, name_there = self._places[name]
        return file.shape(name_there)

    def rename(self, dense: Mapping[str, nn.Parameter], converted: nn.Module) -> None:
        """Follow a conversion: give each tensor the name that its Parameter has now.

        dense: the Parameters by their names before.
        """
        now = dict(converted.named_parameters(remove_duplicate=False))
        names = {id(parameter): name for name, parameter in now.items()}
        for name, parameter in dense.items():
            if name in self._places and name not in now and id(parameter) in names:
                self._places[names[id(parameter)]] = self._places.pop(name)

    def _find(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no weights file or folder {self.path}")
        index = self.path / "model.safetensors.index.json"
        files = _indexed(index) if index.is_file() else sorted(filter(Path.is_file, self.path.glob("*.safetensors")))
        if not files:
            raise ValueError(
                f"{self.path}: there is no .safetensors file in this folder, and other files do not stream"
            )
        return files


def _indexed(index: Path) -> list[Path]:
    """Return the files that an index names; they lie beside it."""
    try:
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not an index of weights (a JSON object with a weight_map to file names)") from None
    if odd := [name for name in named if not isinstance(name, str) or Path("x", name).parent != Path("x")]:
        raise ValueError(f"{index}: it names {odd[0]!r}, which is no name of a file beside it")
    files = [index.parent / name for name in named]
    if missing := [file.name for file in files if not os.path.isfile(file)]:
        raise FileNotFoundError(f"{index}: it names {missing[0][:200]!r}, which is not there")
    return files


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build models without memory for their Parameters, which are on the meta device; buffers are real.

    Not `torch.device("meta")`: that would lose the values of buffers that are in no file, such as rotary frequencies.
    Models that other threads build meanwhile are as ever.
    """
    thread = threading.get_ident()
    made = WeakIdKeyDictionary()  # a Parameter that has two places keeps both

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        if parameter not in made:
            made[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        found: nn.Parameter = made[parameter]
        return found

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


class DiskOffload:
    """Give a model on the meta device the weights it needs, while it needs them.

    model: built `parameters_on_meta` and converted; after this call its Parameters and masks have a device, and no
    memory but what is in use: at most `budget_bytes`, or what one module needs. Where a tensor is read before its
    module runs, NaN stand in its place. A layer that the journal holds, if there is one, comes from
    there, with its mask. `close` takes the hooks away.

    Raises ValueError if the file is not for this model.
    """

    def __init__(self, model: nn.Module, weights: LazySafetensors, journal: Journal | None, budget_bytes: int) -> None:
        self.model, self.weights, self.journal, self.budget_bytes = model, weights, journal, budget_bytes
        self.n_bytes, self.peak_bytes = 0, 0
        self._names = {id(module): name for name, module in model.named_modules()}
        self._in_use: OrderedDict[int, Callable[[], int]] = OrderedDict()
        self._keys = _make_places(model, weights, _keys(model, weights))
        self._hooks = [module.register_forward_pre_hook(self._before) for module in model.modules() if _own(module)]

    def close(self) -> None:
        """Take the hooks away; the model keeps what it has just now."""
        for hook in self._hooks:
            hook.remove()

    def fetch(self, module: nn.Module) -> None:
        """Make sure that a module's own Parameters and mask are in memory."""
        modules = module.modules() if isinstance(module, _READ_WHOLE) else (module,)
        wanted = [(one, key, parameter) for one in modules for key, parameter in _own(one)]
        for _, _, parameter in wanted:
            if id(parameter) in self._in_use:
                self._in_use.move_to_end(id(parameter))
        keep = {id(parameter) for _, _, parameter in wanted}
        for one, key, parameter in wanted:
            if id(parameter) not in self._in_use:
                self._make_room(_n_bytes(one, key, parameter), keep)
                self._load(one, key, parameter)

    def write(self, name: str, layer: MaskedLayer) -> None:
        """Keep a layer that is finished in the journal, which it is read from when it is needed again."""
        assert self.journal is not None
        self.journal.write(name, layer)

    def _before(self, module: nn.Module, args: object) -> None:
        self.fetch(module)

    def _make_room(self, n_bytes: int, keep: set[int]) -> None:
        n_before = len(self._in_use)
        for old in [key for key in self._in_use if key not in keep]:
            if self.n_bytes + n_bytes <= self.budget_bytes:
                break
            self.n_bytes -= self._in_use.pop(old)()
        if len(self._in_use) < n_before:
            _return_memory()

    @torch.no_grad()
    def _load(self, module: nn.Module, key: str, parameter: nn.Parameter) -> None:
        name = self._names[id(module)]
        masked = isinstance(module, MaskedLayer) and key == "weight"
        n_bytes = _n_bytes(module, key, parameter)
        if self.journal is not None and name in self.journal and isinstance(module, MaskedLayer):
            entry, tensors = self.journal.read(name)
            if masked:
                weight, mask = decode_weight(entry, tensors)
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module.matrix(parameter.data).copy_(weight)
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
            parameter.data = _place(parameter)
            if isinstance(module, MaskedLayer) and masked:
                module.mask = _place(module.mask, fill=True)
            return n_bytes

        self._in_use[id(parameter)] = drop


def named_tensors(model: nn.Module, weights: LazySafetensors | None) -> Iterator[tuple[str, Tensor]]:
    """Return what a converted model holds before it is pruned, one tensor at a time: Parameters and buffers, no masks.

    weights: where the Parameters come from, of a model that was built `parameters_on_meta`.
    """
    keys = None if weights is None else _keys(model, weights)
    masks = {id(module.mask) for module in model.modules() if isinstance(module, MaskedLayer)}
    for name, parameter in model.named_parameters():
        yield name, parameter if weights is None or keys is None else weights.read(keys[id(parameter)])
    for name, buffer in model.named_buffers():
        if id(buffer) not in masks:
            yield name, buffer if weights is None or name not in weights else weights.read(name)


def parameter_bytes(model: nn.Module, weights: LazySafetensors | None) -> dict[int, int]:
    """Return the bytes of each Parameter, by its id; of one that stays on disk, as it is there."""
    if weights is None:
        return {id(parameter): parameter.nbytes for parameter in model.parameters()}
    keys = _keys(model, weights)
    return {id(p): p.numel() * weights.dtype(keys[id(p)]).itemsize for p in model.parameters()}


def largest_block_bytes(model: nn.Module) -> int:
    """Return the bytes of the largest thing that has to be in memory at once, weights and masks.

    That is a child of an nn.ModuleList or nn.Sequential, or a module with all that is directly its own.
    """
    blocks = [child for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) for child in m.children()]
    owners = [sum(_n_bytes(m, key, p) for key, p in _own(m)) for m in model.modules()]
    whole = [sum(_n_bytes(m, key, p) for m in block.modules() for key, p in _own(m)) for block in blocks]
    return max([*owners, *whole], default=0)


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(key, parameter) for key, parameter in module._parameters.items() if parameter is not None]


def _n_bytes(module: nn.Module, key: str, parameter: nn.Parameter) -> int:
    """Return what a Parameter takes, with its mask."""
    n = parameter.numel()
    return n * parameter.element_size() + (n if isinstance(module, MaskedLayer) and key == "weight" else 0)


def _keys(model: nn.Module, weights: LazySafetensors) -> dict[int, str]:
    """Say under which name each Parameter is in the file, whichever of its names that is."""
    keys: dict[int, str] = {}
    missing: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in weights:
            missing.setdefault(id(parameter), name)
        elif id(parameter) not in keys:
            _check_fits(weights, name, parameter)
            keys[id(parameter)] = name
    if lost := [name for one, name in missing.items() if one not in keys]:
        raise ValueError(f"{weights.path}: not for this model: it lacks {len(lost)} of its Parameters {lost[:3]}")
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if odd := [name for name in weights if name not in known]:
        raise ValueError(f"{weights.path}: not for this model: {len(odd)} tensors are too many {odd[:3]}")
    return keys


def _check_fits(weights: LazySafetensors, name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor of the file cannot be what this one of the model holds."""
    if weights.shape(name) != tuple(tensor.shape):
        raise ValueError(
            f"{weights.path}: {name} is {weights.shape(name)} in the file, {tuple(tensor.shape)} in the model"
        )
    check_dtype(weights.path, name, weights.dtype(name), tensor.dtype)


def _make_places(model: nn.Module, weights: LazySafetensors, keys: dict[int, str]) -> dict[int, str]:
    """Turn meta Parameters and masks into tensors without memory on the CPU, and read the buffers.

    Returns the names in the file by the new Parameters.
    """
    old = list(model.parameters())  # kept until the end, so that no new one gets the id of an old one
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in _own(module):
            if id(parameter) not in made:
                dtype = weights.dtype(keys[id(parameter)])
                made[id(parameter)] = nn.Parameter(_place(parameter, dtype), requires_grad=False)
            module._parameters[key] = made[id(parameter)]
        if isinstance(module, MaskedLayer):
            module.mask = _place(module.mask, fill=True)
        for key, buffer in module._buffers.items():
            full = f"{name}.{key}".lstrip(".")
            if buffer is not None and full in weights:
                _check_fits(weights, full, buffer)
                module._buffers[key] = weights.read(full)
    return {id(made[id(parameter)]): keys[id(parameter)] for parameter in old}


def _return_memory() -> None:
    """Let the C library give the system back what is free.

    Weights and activations that come and go leave holes that it keeps: a model of 100 MB, with 3 MB of it in use at a
    time, grew by up to 300 MB, and by about 50 MB with this. A C library other than glibc has no such call.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _place(tensor: Tensor, dtype: torch.dtype | None = None, *, fill: float | bool = math.nan) -> Tensor:
    """Return a tensor of the same shape that takes no memory: all of it is one value."""
    dtype = dtype or tensor.dtype
    return torch.full((), fill if dtype.is_floating_point else bool(fill), dtype=dtype, device="cpu").expand(
        tensor.shape
    )

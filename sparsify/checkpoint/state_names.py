"""Names of a model's modules and state as they are without wrappers around it: nn.DataParallel, torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparsify.checkpoint.container import Header
from sparsify.layer_names import join

#: The name under which a wrapper holds the module it wraps, and the types of wrapper that do so. Names that begin with
#: an underscore are torch's alone.
_HELD_AS: dict[str, tuple[type[nn.Module], ...]] = {
    "module": (nn.DataParallel, nn.parallel.DistributedDataParallel),
    "_orig_mod": (nn.Module,),
    "_checkpoint_wrapped_module": (nn.Module,),
    "_fsdp_wrapped_module": (nn.Module,),
}


class Names:
    """The plain names of a model's modules and state: without wrappers.

    modules: every module by its first plain name; the name of a wrapper means the wrapped module.
    places: the same by all names; a module in several places has several.

    >>> names = Names(nn.Sequential(nn.DataParallel(nn.Linear(2, 2))))
    >>> names.modules["0"], list(names.state())
    (Linear(in_features=2, out_features=2, bias=True), ['0.weight', '0.bias'])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._inside = {
            join(name, held_as)
            for name, module in model.named_modules(remove_duplicate=False)
            for held_as, types in _HELD_AS.items()
            if isinstance(module, types) and held_as in module._modules
        }
        self.modules = {self.plain(name): module for name, module in model.named_modules()}
        self.places = {self.plain(name): module for name, module in model.named_modules(remove_duplicate=False)}

    def plain(self, name: str) -> str:
        """Return a name of the model without the parts of wrappers."""
        kept, path = [], ""
        for part in name.split("."):
            path = join(path, part)
            if path not in self._inside:
                kept.append(part)
        return ".".join(kept)

    def state(self) -> dict[str, Any]:
        """Return the model's state by plain names; Parameters and buffers are the very ones."""
        return {self.plain(name): value for name, value in self.model.state_dict(keep_vars=True).items()}

    def load(self, tensors: Mapping[str, Tensor], *, assign: bool) -> None:
        """Load the tensors that are state of the model, as its load_state_dict does."""
        own = {name: self.plain(name) for name in self.model.state_dict(keep_vars=True)}
        given = {name: tensors[plain] for name, plain in own.items() if plain in tensors}
        self.model.load_state_dict(given, strict=False, assign=assign)

    def of_file(self, header: Header, tensors: Mapping[str, Tensor]) -> tuple[Header, dict[str, Tensor]]:
        """Return a file's header and tensors under plain names; files had the names of wrappers in them once."""
        found = {*header.layers, *header.aliases, *header.aliases.values(), *header.choices, *header.records, *tensors}
        renamed = {name: ".".join(p for p in name.split(".") if p not in _HELD_AS or p == "module") for name in found}
        while found and "module" not in self.modules and all(n.split(".")[0] == "module" for n in renamed.values()):
            renamed = {name: plain.partition(".")[2] for name, plain in renamed.items()}
        if len(set(renamed.values())) < len(renamed):
            return header, dict(tensors)
        changes = {
            "layers": {renamed[name]: entry for name, entry in header.layers.items()},
            "aliases": {renamed[alias]: renamed[name] for alias, name in header.aliases.items()},
            "choices": {renamed[name]: choice for name, choice in header.choices.items()},
            "records": {renamed[name]: record for name, record in header.records.items()},
        }
        return header.model_copy(update=changes), {renamed[name]: tensor for name, tensor in tensors.items()}

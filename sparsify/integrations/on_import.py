"""Code that runs once another library is imported, before or after this one: nothing is imported before it is there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: A module of another library -> the module of ours with the `register()` to be called once the other is imported.
HOOKS = {
    "transformers.modeling_utils": "sparsify.integrations.transformers_quantizer",
    "sentence_transformers.base.model": "sparsify.integrations.sentence_transformers_card",
    "diffusers.models.modeling_utils": "sparsify.integrations.diffusers_quantizer",
    "peft.tuners.tuners_utils": "sparsify.integrations.peft_merge",
    "torchao.quantization.quant_api": "sparsify.integrations.foreign_quantizers",
    "optimum.quanto.quantize": "sparsify.integrations.foreign_quantizers",
}


#: Of HOOKS, the modules that are registered, and those of ours that are being loaded: to import one imports the other
#: library, whose own loading comes first then.
_registered: set[str] = set()
_loading: set[str] = set()


class _Finder(MetaPathFinder):
    """A finder that finds nothing of its own: it lets the others find a module, and follows its loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec found by the next finder, with a loader that registers afterwards."""
        if fullname not in HOOKS and fullname not in HOOKS.values():
            return None
        for finder in sys.meta_path:
            found = None if finder is self else finder.find_spec(fullname, path, target)
            if found is not None:
                if found.loader is not None:
                    found.loader = _Loader(found.loader)
                return found
        return None


class _Loader(Loader):
    """A module's own loader, and our `register()` after it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let the own loader create the module."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, leave no trace of this loader on it, and register."""
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        _loading.add(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            _loading.discard(module.__name__)
        for name, ours in HOOKS.items():
            if module.__name__ in (name, ours) and name in sys.modules:
                _register(name)


def register_all() -> None:
    """Register with every library of HOOKS: at once if it is imported, else when it will be."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in HOOKS:
        if name in sys.modules:
            _register(name)


def _register(name: str) -> None:
    """Call the `register()` for another library, once, unless one of the two modules is still being loaded."""
    if not _loading.isdisjoint((name, HOOKS[name])):
        return
    ours = importlib.import_module(HOOKS[name])
    if name not in _registered:
        _registered.add(name)
        ours.register()

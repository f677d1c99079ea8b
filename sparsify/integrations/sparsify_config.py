"""SparsifyConfig: the entry `quantization_config` of a model's configuration, for transformers and diffusers."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsify.checkpoint.folder import KINDS
from sparsify.conversion.convert import convert
from sparsify.conversion.module_surgery import layers_of_type, replace
from sparsify.inference.export import check_format, export
from sparsify.inference.fusion import fuse_activations
from sparsify.layers import MaskedLayer
from sparsify.masking.methods.registry import METHODS, Method
from sparsify.masking.spec import PruningSpec, check_options
from sparsify.pruning.prune import prune

#: The version of the entry in config.json; a reader refuses a later one.
VERSION = 1


class QuantMethod(enum.StrEnum):
    """The name of this library among quantization methods; both libraries look for its `value`."""

    SPARSIFY = "sparsify"


class SparsifyConfig:
    """Prune a model while it is loaded: `from_pretrained(..., quantization_config=SparsifyConfig(sparsity=0.5))`.

    The weights of every layer are ranked by `method`, the lowest removed, and the model exported; heads tied to an
    embedding stay dense. In config.json the same class says that a folder holds a model of this library, exported
    ("packed") or masked; such a model is loaded as it is, and needs no argument.

    sparsity, method, pattern: as for `prune`; the methods are those without data.
    include, exclude: as for `convert`.
    layers: "packed" for an exported model, "masked" for one to be trained on.
    format: as for `export`, of an exported model.

    Raises ValueError for options that do not fit.

    >>> SparsifyConfig(sparsity=0.5).to_dict()
    {'quant_method': 'sparsify', 'version': 1, 'layers': 'packed'}
    """

    quant_method = QuantMethod.SPARSIFY

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        method: str | Method = "magnitude",
        pattern: str = "unstructured",
        include: Any = None,
        exclude: Any = None,
        layers: str = "packed",
        format: str = "auto",
        version: int = VERSION,
    ) -> None:
        if isinstance(method, str) and method not in METHODS:
            raise ValueError(f"method {method!r} is none of those without data: {', '.join(METHODS)}")
        if layers not in KINDS:
            raise ValueError(f"layers={layers!r} is none of: {', '.join(KINDS)}")
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"the model was saved by another sparsify (version {version!r} of its entry in config.json, this one "
                f"reads {VERSION}); upgrade it"
            )
        check_format(format)
        if layers == "masked" and format != "auto":
            raise ValueError(f"format={format!r} has no effect on masked layers; export chooses it")
        if sparsity is not None or pattern != "unstructured":
            check_options(PruningSpec(sparsity, method, pattern))
        self.sparsity, self.method, self.pattern = sparsity, method, pattern
        self.include, self.exclude = include, exclude
        self.layers, self.format, self.version = layers, format, version

    @property
    def prunes(self) -> bool:
        """True if the config asks for a pruning."""
        return self.sparsity is not None or self.pattern != "unstructured"

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> SparsifyConfig | tuple[SparsifyConfig, dict[str, Any]]:
        """Read the entry of a config.json. Raises ValueError for a key that is not known there."""
        own = {key: value for key, value in config_dict.items() if key != "quant_method"}
        if odd := sorted(map(str, own.keys() - {"version", "layers"})):
            raise ValueError(f"config.json: quantization_config has a key {odd[0]!r} unknown to sparsify")
        config = cls(**own)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of config.json: what the folder holds, not the way it was made."""
        return {"quant_method": self.quant_method.value, "version": self.version, "layers": self.layers}

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the entry as text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change nothing, and return the arguments: they are not of this config."""
        return kwargs

    def prune(self, model: nn.Module) -> None:
        """Convert, prune and, if asked for, export a dense model in place."""
        convert(model, include=self.include, exclude=self.exclude, tied="skip")
        prune(model, self.sparsity, method=self.method, pattern=self.pattern)
        if self.layers == "packed":
            fast = export(model, format=self.format, copy=False)
            masked = layers_of_type(model, MaskedLayer)
            fuse_activations(replace(model, {layer: fast.get_submodule(name) for name, layer in masked.items()}))

    def __repr__(self) -> str:
        return f"SparsifyConfig({self.to_dict()})"

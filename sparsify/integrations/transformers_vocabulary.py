"""The hooks of transformers around a vocabulary: tie_weights and resize_token_embeddings of models with layers of ours.

transformers ties by giving one Parameter to two modules, and resizes by making new dense modules. A packed weight is no
Parameter, and a new module has no mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparsify.layer_names import join
from sparsify.layers import Int8Embedding, MaskedLayer, PackedLayer, Tied


def register(model_class: Any) -> None:
    """Let the methods of transformers' base class know our layers, once."""
    if not hasattr(model_class.tie_weights, "of_sparsify"):
        model_class.tie_weights = _tying(model_class.tie_weights)
        model_class.resize_token_embeddings = _resizing(model_class.resize_token_embeddings)


def _tying(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `tie_weights`: a packed weight counts as tied to a partner of the same values, and to no other."""

    @functools.wraps(original)
    def tie_weights(self: Any, missing_keys: Any = None, recompute_mapping: bool = True) -> Any:
        ours = (PackedLayer, Int8Embedding)
        packed = {join(name, "weight") for name, module in self.named_modules() if isinstance(module, ours)}
        if missing_keys is not None or not recompute_mapping or not packed:  # while loading, our loader ties
            return original(self, missing_keys=missing_keys, recompute_mapping=recompute_mapping)
        known = self.all_tied_weights_keys
        ties = known if getattr(self.config, "tie_word_embeddings", True) else {}
        for target, source in ties.items():
            if target in packed or source in packed:
                _check_equal(self, target, source)
        self.all_tied_weights_keys = {key: ties[key] for key in ties if key not in packed and ties[key] not in packed}
        try:
            return original(self, recompute_mapping=False)
        finally:
            self.all_tied_weights_keys = known

    tie_weights.of_sparsify = True  # type: ignore[attr-defined]
    return tie_weights


def _resizing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `resize_token_embeddings`: refused where it would drop a mask or meet a packed weight."""

    @functools.wraps(original)
    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        ours = (MaskedLayer, Tied, PackedLayer, Int8Embedding)
        ends = [self.get_input_embeddings(), self.get_output_embeddings()]
        changes = pad_to_multiple_of is not None or new_num_tokens not in (None, _rows(ends[0]))
        for name, module in self.named_modules() if changes else ():
            if isinstance(module, ours) and any(module is end for end in ends):
                state = "exported" if isinstance(module, (PackedLayer, Int8Embedding)) else "masked"
                raise ValueError(
                    f"{name}: a {state} layer, {_rows(module)} tokens, and resize_token_embeddings would put a dense "
                    "one in its place: resize the dense model (see sparsify.to_dense) and prune it anew, or "
                    f"prune without this layer (exclude=[{name!r}])"
                )
        return original(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    return resize_token_embeddings


def _rows(module: nn.Module) -> int:
    """Return the number of tokens of an embedding or a head."""
    return int(module.weight.shape[0])  # type: ignore[index]


def _check_equal(model: nn.Module, target: str, source: str) -> None:
    """Raise ValueError if two tied weights, one of them packed, differ."""
    first, second = (model.get_submodule(key.rpartition(".")[0]).weight for key in (target, source))
    if not torch.equal(first, second):  # type: ignore[arg-type]
        raise ValueError(
            f"{target} and {source} differ, and one of them is packed: nothing can tie them. Call "
            "sparsify.to_dense(model) first, or set config.tie_word_embeddings to False if they are to differ"
        )

"""The one hook of sentence-transformers: the part of ours in the card that it writes itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sentence_transformers.base import model as their_module

from sparsify.checkpoint.folder import kind_of
from sparsify.integrations.pretrained import facts_of
from sparsify.reporting.model_card import write_card


def register() -> None:
    """Let the card of a model with layers of ours have our part, once."""
    base: Any = their_module.BaseModel
    if not hasattr(base._create_model_card, "of_sparsify"):
        base._create_model_card = _writing(base._create_model_card)


def _writing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        original(self, path, *args, **kwargs)
        if kind_of(self) is not None:
            write_card(path, self, facts_of(self))

    create.of_sparsify = True  # type: ignore[attr-defined]
    return create

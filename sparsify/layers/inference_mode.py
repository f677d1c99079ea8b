"""Plain tensors inside torch.inference_mode(): masks and weights for later training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def making_tensors() -> Iterator[None]:
    """Make plain tensors in the block, without gradient: an inference tensor takes part in no training.

    >>> with torch.inference_mode():
    ...     with making_tensors():
    ...         made = torch.ones(2)
    >>> made.is_inference()
    False
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        with torch.no_grad():
            yield


@contextmanager
def writing_to(tensor: Tensor) -> Iterator[None]:
    """Allow the block to write into a tensor; an inference tensor takes writes only in torch.inference_mode()."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            yield
    else:
        yield

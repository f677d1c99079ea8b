"""torch.inference_mode() kept from what has to outlive it: masks and weights that are trained later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def making_tensors() -> Iterator[None]:
    """Make plain tensors, without gradient: those made under torch.inference_mode() take part in no training.

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
    """Write into a tensor in place: outside torch.inference_mode(), one made inside takes no change."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            yield
    else:
        yield

"""Inference: plain tensors inside torch.inference_mode(), for later training, and calls that nobody watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules import module as nn_module

from sparsify.kernels.observers import is_transformed

_GLOBAL_HOOKS = (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks)


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


def in_plain_inference() -> bool:
    """Return whether calls are just made: not traced, compiled, transformed, cast, watched or differentiated."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
        or any(_GLOBAL_HOOKS)
        or is_transformed()
    )

"""The Triton kernels for GPUs behind tensors: pack a CSR weight into a form, unpack it, multiply with it.

As in `native`, a packed weight is two plain tensors: `index` (uint8) and `values`. Packing is torch code that runs on
any device. Triton itself is imported by the first multiplication on a GPU, or on the CPU if TRITON_INTERPRET=1 asks for
its slow interpreter.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.kernels.csr import CSR
from sparsify.kernels.gpu import blocks, launch, narrow, tiles, two_four
from sparsify.kernels.gpu.weight import Weight
from sparsify.kernels.reference import ACTIVATIONS

#: Each form's functions: pack, check, unpack, multiply, dense.
FORMS: dict[str, ModuleType] = {"tiles": tiles, "narrow": narrow, "blocks": blocks, "2:4": two_four}
#: Of the forms that are not for every mask, what says whether one fits.
_FITS: dict[str, Callable[[CSR, tuple[int, int]], bool]] = {"blocks": blocks.fits, "2:4": two_four.fits}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: The oldest compute capability whose tensor cores take bfloat16.
FEWEST_CAPABILITY = (8, 0)

_ACTIVATIONS = tuple(ACTIVATIONS.values())


def why_missing(device: torch.device) -> str:
    """Return the reason if the kernels do not run on a device, else ""."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu":
        return "" if os.environ.get("TRITON_INTERPRET") == "1" else "they run on a GPU"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"they run on an NVIDIA GPU, not on {device.type if torch.version.hip is None else 'ROCm'}"
    capability = torch.cuda.get_device_capability(device)
    if capability < FEWEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability}, {FEWEST_CAPABILITY} is needed"
        )
    return ""


def why_not(form: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the reason if a form does not run on a device and dtype, else ""."""
    missing = why_missing(device)
    if not missing and form == "2:4":
        missing = two_four.why_missing(device)
    if not missing and dtype not in (two_four.DTYPES if form == "2:4" else DTYPES):
        missing = f"{dtype} is not among their types"
    return missing


def fits(form: str, csr: CSR, shape: tuple[int, int]) -> bool:
    """Return whether a form can hold this weight."""
    return form not in _FITS or _FITS[form](csr, shape)


def pack(form: str, csr: CSR, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pack a CSR weight (out, in) on its own device: (index, values)."""
    packed: tuple[Tensor, Tensor] = FORMS[form].pack(csr, shape)
    return packed


def check(form: str, index: Tensor, n_values: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless kernels can follow this index. Waits for the device."""
    if index.dtype != torch.uint8 or index.dim() != 1 or not index.is_contiguous():
        raise ValueError("the packed index must be bytes, one after the other")
    FORMS[form].check(index, n_values, shape)


def unpack(form: str, index: Tensor, values: Tensor, shape: tuple[int, int]) -> CSR:
    """Turn a form back into CSR, bit for bit, on its own device. The index must have passed `check`."""
    csr: CSR = FORMS[form].unpack(index, values, shape)
    return csr


def linear(
    form: str,
    x: Tensor,
    index: Tensor,
    values: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    activation: int,
    rows: tuple[int, int],
) -> Tensor:
    """Return activation(x @ weight.T + bias) for x of shape (..., in), limited to the outputs rows[0] to rows[1] - 1.

    The number of tokens decides: few are multiplied by a kernel of the form; for many the weight is expanded into
    memory of the caching allocator, lent to one layer after the other, and multiplied dense. Nothing waits for
    the device.
    """
    weight, inner, leading = Weight(index, values, shape, rows), shape[1], x.shape[:-1]
    bias = bias if bias is None or weight.n_rows == shape[0] else bias[slice(*rows)]
    flat = x.reshape(leading.numel(), inner)
    if inner > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    y: Tensor | None = None
    with launch.on(x.device):
        if 0 not in (flat.shape[0], weight.n_rows, inner):
            y = FORMS[form].multiply(flat, weight, bias, activation)
    if y is None:
        with torch.autocast(x.device.type, enabled=False):
            y = _ACTIVATIONS[activation](F.linear(flat, dense(form, index, values, shape, rows), bias))
    return y.reshape(*leading, weight.n_rows)


def dense(form: str, index: Tensor, values: Tensor, shape: tuple[int, int], rows: tuple[int, int]) -> Tensor:
    """Expand the rows from rows[0] to before rows[1] to a dense weight."""
    weight = Weight(index, values, shape, rows)
    if 0 in (weight.n_rows, shape[1]):
        return values.new_zeros((weight.n_rows, shape[1]))
    with launch.on(values.device):
        expanded: Tensor = FORMS[form].dense(weight)
    return expanded

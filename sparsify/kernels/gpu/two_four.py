"""The form "2:4": at most two of every four columns kept, for the sparse tensor cores, by torch's cuSPARSELt operators.

The values are the weight as compressed by cuSPARSELt: the kept values, two for every four columns, then its own,
undocumented metadata. So the index holds the mask as well, a bit for each weight, and packing compares the weight
after a round trip, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.kernels.csr import CSR, csr_to_dense, dense_to_csr
from sparsify.kernels.gpu import bits
from sparsify.kernels.gpu.weight import Weight
from sparsify.kernels.reference import ACTIVATIONS

DTYPES = (torch.float16, torch.bfloat16)

#: Rows, columns and tokens must be multiples of this; tokens are padded.
MULTIPLE = 16

#: Sixteenths of a weight that cuSPARSELt compresses it to: eight of values, one of metadata.
SIXTEENTHS = 9

_ACTIVATIONS = tuple(ACTIVATIONS.values())
_torch: Any = torch  # the operators have a leading underscore, and no types


def why_missing(device: torch.device) -> str:
    """Return the reason if the operators do not run on a device with Triton's kernels, else ""."""
    if device.type != "cuda":
        return "it needs the sparse tensor cores of a GPU"
    return "" if torch.backends.cusparselt.is_available() else "this torch has no cuSPARSELt"


def fits(csr: CSR, shape: tuple[int, int]) -> bool:
    """Return whether the mask is 2:4, the sizes are right, and cuSPARSELt's values can be read back."""
    if 0 in shape or shape[0] % MULTIPLE or shape[1] % MULTIPLE:
        return False
    weight, mask = csr_to_dense(csr, shape)
    if int(mask.reshape(-1, 4).sum(1).max()) > 2:
        return False
    back = unpack(*_pack(weight, mask), shape)
    return all(torch.equal(_bytes(one), _bytes(other)) for one, other in zip(back, csr, strict=True))


def pack(csr: CSR, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pack a CSR weight: (index, values). Raises ValueError if it does not fit."""
    if not fits(csr, shape):
        raise ValueError(
            f"the form '2:4' needs a 2:4 mask of a shape in multiples of {MULTIPLE}, got {shape}; use 'tiles'"
        )
    return _pack(*csr_to_dense(csr, shape))


def check(index: Tensor, n_values: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless the bits are a 2:4 mask, and the values as many as cuSPARSELt makes of such a weight."""
    n = shape[0] * shape[1]
    if index.numel() != n // 8 or n_values * 16 != n * SIXTEENTHS:
        raise ValueError(f"{index.numel()} bytes and {n_values} values are no weight {shape} in the form '2:4'")
    if int(bits.unpack(index).reshape(-1, 4).sum(1).max()) > 2:
        raise ValueError("the mask in the form '2:4' keeps more than two of four")


def unpack(index: Tensor, values: Tensor, shape: tuple[int, int]) -> CSR:
    """Turn the form back into CSR."""
    return dense_to_csr(*_expand(index, values, shape))


def multiply(x: Tensor, weight: Weight, bias: Tensor | None, activation: int) -> Tensor | None:
    """Multiply x (tokens, in), as many as there are; None for some rows only."""
    if weight.n_rows < weight.shape[0]:
        return None
    tokens = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -tokens % MULTIPLE))
    y: Tensor = _torch._cslt_sparse_mm(weight.values, padded.t(), bias=bias, transpose_result=True)
    return _ACTIVATIONS[activation](y[:tokens])


def dense(weight: Weight) -> Tensor:
    """Expand to a dense weight."""
    first, end = weight.rows
    return _expand(weight.index, weight.values, weight.shape)[0][first:end]


def _pack(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return bits.pack(mask), _torch._cslt_compress(weight)


def _expand(index: Tensor, values: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return weight and mask. A group with one kept value has it in either of its two places."""
    mask = bits.unpack(index).reshape(-1, 4)
    places = values.reshape(-1)[: 2 * mask.shape[0]].reshape(-1, 2)
    is_empty = places.contiguous().view(torch.int16)[:, :1] == 0
    alone = torch.where(is_empty, places[:, 1:], places[:, :1])
    both = mask.sum(1, keepdim=True) == 2
    second = (mask.cumsum(1) == 2) & both
    value = torch.where(second, places[:, 1:], torch.where(both, places[:, :1], alone))
    return torch.where(mask, value, 0).reshape(shape), mask.reshape(shape)


def _bytes(tensor: Tensor) -> Tensor:
    """View any dtype as one for every operator and device; uint16 is none."""
    return tensor.contiguous().view(torch.uint8)

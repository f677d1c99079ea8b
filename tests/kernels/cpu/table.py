"""Shared parts of the kernel tests: one table of cases, weights, the accuracy rule, and guarded memory."""

import ctypes
import functools
import itertools
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.kernels.cpu import library as native

FORMS = native.FORMS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (out, in): nothing in, one, odd, prime, around a tile (16 rows), a block of rows (64), a window of columns (32), a
# block of columns (128 to 240), a window of rows (128); a crowded stride; a tile too wide to be kept whole.
SHAPES = [
    (3, 0), (1, 1), (1, 64), (3, 5), (16, 31), (17, 33), (64, 32), (65, 101), (131, 257), (40, 512), (97, 769),
    (300, 130), (20, 2500),
]  # fmt: skip
SPARSITIES = (0.0, 0.5, 0.7, 0.9, 0.98, 1.0)
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 40, 64, 67, 130, 200)
TOKENS_PER_WEIGHT = 3
ACTIVATIONS = {
    None: lambda a: a,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda a: functional.gelu(a, approximate="tanh"),
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "relu6": functional.relu6,
}


def cases() -> Iterator[tuple[tuple[int, int], float, int, str | None, bool, int]]:
    """(shape, sparsity, tokens, activation, with bias, extra elements between rows) of the table.

    Every weight meets a few of the numbers of tokens, every number of tokens many weights.
    """
    tokens, activations, biases, gaps = (
        itertools.cycle(c) for c in (TOKENS, ACTIVATIONS, (True, True, False), range(4))
    )
    for shape, sparsity in itertools.product(SHAPES, SPARSITIES):
        for _ in range(TOKENS_PER_WEIGHT):
            yield shape, sparsity, next(tokens), next(activations), next(biases), next(gaps)


@functools.cache
def random_weight(shape: tuple[int, int], sparsity: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight scaled so that outputs are about 1, and its mask, which has an empty row where there are several."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) >= sparsity
    if shape[0] > 2 and sparsity > 0:
        mask[1] = False
    weight = torch.randn(shape, generator=generator) / max(1, shape[1] * (1 - sparsity)) ** 0.5
    return weight * mask, mask


def to_csr(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row pointers and columns of a mask, int32."""
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    return crow, mask.nonzero()[:, 1].int()


def pack(form: str, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(index, values), checked."""
    index, values = native.pack(form, *to_csr(mask), weight[mask], tuple(weight.shape))
    native.check(form, index, values.numel(), tuple(weight.shape))
    return index, values


def packed_random_weight(
    form: str, shape: tuple[int, int], sparsity: float, dtype: torch.dtype, *, own: bool = False
) -> tuple[Tensor, Tensor]:
    """pack(random_weight) in a dtype; several tests use the same.

    A gather index is packed for the instruction set in use. A panel has patterns of several rows, which some
    instruction sets would not give it; own: as the one in use packs it.
    """
    packer = native.kernel() if own or form == "gather" else "portable"
    return _packed_random_weight(form, packer if form in ("gather", "panel") else "", shape, sparsity, dtype)


@functools.cache
def _packed_random_weight(
    form: str, packer: str, shape: tuple[int, int], sparsity: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    weight, mask = random_weight(shape, sparsity)
    in_use = native.kernel()
    native.set_kernel(packer or in_use)
    try:
        return pack(form, weight.to(dtype), mask)
    finally:
        native.set_kernel(in_use)


def assert_as_accurate_as_torch(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    """Error against float64 at most twice that of dense torch in the same dtype, plus a few units in the last place."""
    exact, allowed = exact_and_allowed_error(x, weight, bias, activation)
    error = (y.double() - exact).abs()
    assert bool((error <= allowed).all()), f"error {error.max():.3g}, allowed {allowed.max():.3g}"


def exact_and_allowed_error(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it a kernel may be; kernels that see the same case share it."""
    act = ACTIVATIONS[activation]
    exact = act(functional.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    dense = act(functional.linear(x, weight, bias))
    # Few terms, few roundings: torch may be exact where we round once. A last place of the largest term is allowed.
    largest = functional.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    slack = 4 * torch.finfo(torch.float32).eps * largest + rounding_error(exact, x.dtype)
    return exact, 2 * (dense.double() - exact).abs().max() + slack


def rounding_error(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance from `exact` of a result rounded to a dtype; less than 1e-37 may be flushed to zero."""
    info = torch.finfo(dtype)
    return info.eps * exact.double().abs() + max(info.smallest_normal * info.eps, 1e-37)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def before_a_guard_page(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last one before a page that must not be touched."""
    n_bytes = tensor.numel() * tensor.element_size()
    pages = -(-max(n_bytes, 1) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _libc.mprotect(address + pages * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    offset = pages * mmap.PAGESIZE - n_bytes
    copy = torch.frombuffer(memory, dtype=torch.uint8)[offset : offset + n_bytes].view(tensor.dtype)
    return copy.copy_(tensor.flatten()).view(tensor.shape)

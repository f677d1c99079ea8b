"""The forms for few tokens, bitmask and gather: every kernel against float64, and the promises of sparsify.h."""

import ctypes
import itertools
import mmap
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sparsify.kernels import native

FORMS = ("bitmask", "gather")
KERNELS = native.known_kernels()
DTYPES = (torch.float32, torch.bfloat16)
# (out, in): one, odd, prime, around the tile (16 rows), the block (64 rows), the window (32 columns), a crowded stride.
SHAPES = [(1, 1), (1, 64), (3, 5), (16, 31), (17, 33), (64, 32), (65, 101), (131, 257), (40, 512), (97, 769)]
SPARSITIES = (0.0, 0.5, 0.7, 0.9, 0.98, 1.0)
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 67)
ACTIVATIONS = {
    None: lambda a: a,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda a: functional.gelu(a, approximate="tanh"),
    "silu": functional.silu,
}


@pytest.fixture(autouse=True)
def _best_kernel_afterwards():
    yield
    native.set_kernel("")


def random_weight(shape: tuple[int, int], sparsity: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight scaled so that outputs are about 1, and its mask, which has an empty row where there are several."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) >= sparsity
    if shape[0] > 2 and sparsity > 0:
        mask[1] = False
    weight = torch.randn(shape, generator=generator) / max(1, shape[1] * (1 - sparsity)) ** 0.5
    return weight * mask, mask


def to_csr(mask: Tensor) -> tuple[Tensor, Tensor]:
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    return crow, mask.nonzero()[:, 1].int()


def pack(form: str, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    index, values = native.pack(form, *to_csr(mask), weight[mask], tuple(weight.shape))
    native.check(form, index, values.numel(), tuple(weight.shape))
    return index, values


def gather_variant(index: Tensor) -> tuple[int, int]:
    """(steps per window, padded) of a gather index: each pair is its own kernel."""
    return struct.unpack_from("<II", bytes(index[:12].tolist()), 4)


def assert_as_accurate_as_torch(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None):
    """Error against float64 at most twice that of dense torch in the same dtype, plus a few units in the last place."""
    act = ACTIVATIONS[activation]
    exact = act(functional.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    dense = act(functional.linear(x, weight, bias))
    # Few terms, few roundings: torch may be exact where we round once. A last place of the largest term is allowed.
    largest = functional.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    slack = 4 * torch.finfo(torch.float32).eps * largest + torch.finfo(y.dtype).eps * exact.abs()
    error, allowed = (y.double() - exact).abs(), 2 * (dense.double() - exact).abs().max() + slack
    assert bool((error <= allowed).all()), f"error {error.max():.3g}, allowed {allowed.max():.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_over_the_table(kernel, form, dtype):
    native.set_kernel(kernel)
    activations, variants, n_cases = itertools.cycle(ACTIVATIONS), set(), 0
    for shape, sparsity in itertools.product(SHAPES, SPARSITIES):
        out, in_ = shape
        weight, mask = random_weight(shape, sparsity)
        weight = weight.to(dtype)
        index, values = pack(form, weight, mask)
        variants.add(gather_variant(index) if form == "gather" else "bitmask")
        for tokens in TOKENS:
            activation = next(activations)
            generator = torch.Generator().manual_seed(n_cases)
            x = torch.randn(tokens, in_ + n_cases % 3, generator=generator).to(dtype)[:, :in_]
            bias = torch.randn(out, generator=generator).to(dtype) if n_cases % 4 else None
            y = torch.full((tokens, out + 5), float("nan"), dtype=dtype)
            native.linear(form, x, index, values, bias, shape, native.ACTIVATIONS[activation], out=y[:, :out])
            assert_as_accurate_as_torch(y[:, :out], x, weight, bias, activation)
            assert bool(y[:, out:].isnan().all()), "wrote beside the output"
            n_cases += 1
    assert n_cases == len(SHAPES) * len(SPARSITIES) * len(TOKENS)
    if form == "gather":
        assert variants == {(6, 1), (6, 0), (3, 1), (3, 0)}, "a kernel of the gather form was never reached"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_wide_rows_stay_accurate(kernel, form):
    native.set_kernel(kernel)
    for sparsity in (0.0, 0.5, 0.9):
        weight, mask = random_weight((32, 9000), sparsity)
        x = torch.randn(3, 9000, generator=torch.Generator().manual_seed(1))
        y = native.linear(form, x, *pack(form, weight, mask), None, (32, 9000))
        assert_as_accurate_as_torch(y, x, weight, None, None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_columns_far_apart(kernel, form):
    native.set_kernel(kernel)
    mask = torch.zeros(20, 3000, dtype=torch.bool)
    mask[0, 0] = mask[0, 2999] = mask[7, 700] = mask[19, 2968] = mask[18, 2967] = True
    weight = mask * torch.arange(1.0, 21).unsqueeze(1)
    x = torch.arange(3000.0).expand(2, 3000)
    y = native.linear(form, x, *pack(form, weight, mask), None, (20, 3000))
    assert torch.equal(y, x @ weight.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_does_not_depend_on_its_company_nor_on_strides_nor_on_threads(kernel, form, dtype):
    native.set_kernel(kernel)
    for shape in ((70, 90), (256, 512)):
        for sparsity in (0.5, 0.9):
            weight, mask = random_weight(shape, sparsity)
            packed = pack(form, weight.to(dtype), mask)
            x = torch.randn(67, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
            together = native.linear(form, x, *packed, None, shape)
            for n in (1, 2, 3, 5, 8, 16):
                assert torch.equal(native.linear(form, x[:n], *packed, None, shape), together[:n])
            wide = torch.cat([x, x], 1)[:, : shape[1]]
            assert torch.equal(native.linear(form, wide, *packed, None, shape), together)
            for threads in (1, 2, 3):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                try:
                    assert torch.equal(native.linear(form, x, *packed, None, shape), together)
                finally:
                    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_inf_and_nan_reach_only_the_outputs_that_keep_their_column(kernel, form, dtype):
    native.set_kernel(kernel)
    n_masked, variants = 0, set()
    for sparsity, tokens, bad in itertools.product((0.3, 0.6, 0.75, 0.95), (1, 9), (float("inf"), float("nan"))):
        shape = (64, 130)
        weight, mask = random_weight(shape, sparsity)
        packed = pack(form, weight.to(dtype), mask)
        variants.add(gather_variant(packed[0]))
        x = torch.randn(tokens, 130, generator=torch.Generator().manual_seed(3)).to(dtype)
        clean = native.linear(form, x, *packed, None, shape)
        for column in range(0, 130, 3):
            dirty = x.clone()
            dirty[-1, column] = bad
            y = native.linear(form, dirty, *packed, None, shape)
            assert torch.equal(y[:-1], clean[:-1]), "another token changed"
            # The weight may be zero by rounding: Inf x 0 is NaN, which is not finite either.
            assert not bool(y[-1, mask[:, column]].isfinite().any())
            assert torch.equal(y[-1, ~mask[:, column]], clean[-1, ~mask[:, column]])
            n_masked += int((~mask[:, column]).sum())
    assert n_masked > 0
    assert form != "gather" or variants >= {(6, 1), (3, 1), (3, 0)}, "padding slots are where this goes wrong"


def test_nothing_in_or_out_or_no_token():
    for kernel, form, dtype in itertools.product(KERNELS, FORMS, DTYPES):
        native.set_kernel(kernel)
        for out, in_, tokens in ((3, 0, 2), (40, 0, 1), (0, 3, 2), (0, 0, 2), (3, 4, 0)):
            packed = pack(form, torch.zeros(out, in_, dtype=dtype), torch.zeros(out, in_, dtype=torch.bool))
            x, bias = torch.zeros(tokens, in_, dtype=dtype), torch.ones(out, dtype=dtype)
            y = native.linear(form, x, *packed, bias, (out, in_))
            assert y.shape == (tokens, out) and bool((y == 1).all())


def test_inf_weights_meet_only_their_own_activation():
    for kernel, form in itertools.product(KERNELS, FORMS):
        native.set_kernel(kernel)
        weight, mask = random_weight((20, 70), 0.6)
        weight[4, mask[4].nonzero()[0]] = float("inf")
        y = native.linear(form, torch.ones(3, 70), *pack(form, weight, mask), None, (20, 70))
        assert bool((y[:, 4] == float("inf")).all())
        assert bool(y[:, torch.arange(20) != 4].isfinite().all())


# ---- memory: nothing past the end of an input is read ---------------------------------------------------------------

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_past_the_end_is_read(kernel, form, dtype):
    native.set_kernel(kernel)
    for shape, sparsity in itertools.product(((1, 1), (5, 37), (16, 32), (70, 96), (33, 1003)), (0.0, 0.4, 0.9, 1.0)):
        weight, mask = random_weight(shape, sparsity)
        index, values = pack(form, weight.to(dtype), mask)
        index, values = before_a_guard_page(index), before_a_guard_page(values)
        bias = before_a_guard_page(torch.randn(shape[0]).to(dtype))
        for tokens in (1, 2, 5, 8):
            x = before_a_guard_page(torch.randn(tokens, shape[1]).to(dtype))
            y = before_a_guard_page(torch.full((tokens, shape[0]), float("nan"), dtype=dtype))
            native.linear(form, x, index, values, bias, shape, out=y)
            assert bool(y.isfinite().all())


# ---- pack, unpack, check --------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(0, 70),
    st.integers(0, 90),
    st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.6, 1.0]),
    st.integers(0, 10**6),
    st.sampled_from(DTYPES),
)
def test_unpack_is_the_inverse_of_pack(form, out, in_, density, seed, dtype):
    mask = torch.rand(out, in_, generator=torch.Generator().manual_seed(seed)) < density
    crow, col = to_csr(mask)
    kept = torch.randn(col.numel(), generator=torch.Generator().manual_seed(seed)).to(dtype)
    kept[::3] = 0  # kept weights may be zero, and stay kept
    index, values = native.pack(form, crow, col, kept, (out, in_))
    native.check(form, index, values.numel(), (out, in_))
    for a, b in zip(native.unpack(form, index, values, (out, in_)), (crow, col, kept), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "crow, col, why",
    [
        ([0, 2, 1], [0, 1], "pointers fall"),
        ([0, 1, 2], [0, 3], "column too large"),
        ([0, 1, 2], [0, -1], "column negative"),
        ([0, 2, 2], [1, 1], "column twice"),
        ([0, 2, 2], [2, 1], "columns fall"),
        ([1, 2, 2], [0, 1], "does not start at 0"),
    ],
)
def test_pack_refuses_what_is_no_csr(form, crow, col, why):
    with pytest.raises(ValueError):
        native.pack(form, torch.tensor(crow), torch.tensor(col), torch.ones(2), (2, 3))
        pytest.fail(why)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sparsity", (0.3, 0.85))
def test_check_leaves_nothing_that_can_harm(form, sparsity):
    """Any single byte of an index may be changed: check refuses, or kernels and unpack stay inside their inputs."""
    shape = (20, 45)
    weight, mask = random_weight(shape, sparsity)
    index, values = pack(form, weight, mask)
    values, x = before_a_guard_page(values), before_a_guard_page(torch.randn(2, 45))
    generator = torch.Generator().manual_seed(4)
    n_refused = 0
    for position in range(index.numel()):
        for flip in {1, 128, int(torch.randint(1, 256, (), generator=generator))}:
            hostile = index.clone()
            hostile[position] ^= flip
            try:
                native.check(form, hostile, values.numel(), shape)
            except ValueError:
                n_refused += 1
                continue
            hostile = before_a_guard_page(hostile)
            crow, col, _ = native.unpack(form, hostile, values, shape)
            native.pack(form, crow, col, torch.ones(col.numel()), shape)  # a CSR matrix again
            for kernel in KERNELS:
                native.set_kernel(kernel)
                native.linear(form, x, hostile, values, None, shape)
    assert n_refused > index.numel()  # most changes are noticed: a third of them at the very least


@pytest.mark.parametrize("form", FORMS)
def test_check_refuses_other_sizes(form):
    weight, mask = random_weight((20, 45), 0.5)
    index, values = pack(form, weight, mask)
    for n in (0, 1, 63, 64, index.numel() - 1):
        with pytest.raises(ValueError):
            native.check(form, before_a_guard_page(index[:n].clone()), values.numel(), (20, 45))
    longer = torch.cat([index, index[:1]])
    for bad_index, n_values, shape in (
        (longer, values.numel(), (20, 45)),
        (index, values.numel() - 1, (20, 45)),
        (index, values.numel() + 1, (20, 45)),
        (index, values.numel(), (21, 45)),
        (index, values.numel(), (20, 44)),
        (index, values.numel(), (20, 46)),
    ):
        with pytest.raises(ValueError):
            native.check(form, bad_index, n_values, shape)


def test_resident_bytes():
    for form, sparsity, limit in (("bitmask", 0.5, 0.55), ("gather", 0.5, 0.83), ("gather", 0.9, 0.17)):
        weight, mask = random_weight((768, 768), sparsity)
        index, values = pack(form, weight, mask)
        assert (index.numel() + 4 * values.numel()) / (4 * weight.numel()) <= limit


def test_a_forked_child_computes():
    weight, mask = random_weight((512, 512), 0.5)
    packed, x = pack("gather", weight, mask), torch.randn(16, 512)
    expected = native.linear("gather", x, *packed, None, (512, 512))
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native.linear("gather", x, *packed, None, (512, 512)), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

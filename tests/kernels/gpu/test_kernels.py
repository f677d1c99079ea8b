"""Every Triton kernel in every dtype, against float64, over odd shapes; on a GPU, or under Triton's interpreter."""

import itertools
import math

import pytest
import torch
from launches import seen
from table import exact_and_allowed_error, random_weight

from sparsify.kernels import ACTIVATIONS, gpu, linear, pack
from sparsify.kernels.csr import dense_to_csr

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# (out, in): one, odd, prime, around a group (64), a tile (64 rows), a window (256), several splits of the columns.
# Few and small, and few rows where a program takes one: the interpreter takes milliseconds for what a GPU does in
# nanoseconds.
SHAPES = {
    "tiles": [(1, 1), (3, 5), (66, 65), (7, 257), (5, 1100)],
    "narrow": [(1, 1), (3, 5), (4, 65), (3, 257), (2, 1100)],
    "blocks": [(16, 16), (64, 64), (96, 96), (16, 272), (32, 1120)],
}
SPARSITIES = (0.0, 0.5, 0.9, 1.0)

#: Numbers of tokens that reach every kernel of a form; so many that each meets every sparsity.
TOKENS = {"tiles": (1, 2, 3, 33, 129), "narrow": (1, 3, 8, 9, 33), "blocks": (1, 17, 70)}
KERNELS = {
    "tiles": {"tiles.few", "tiles.many", "tiles.dense", "epilogue.finish"},
    "narrow": {"narrow.few", "narrow.dense"},
    "blocks": {"blocks.multiply"},
}
ACTIVATED = tuple(ACTIVATIONS)


def packed(form, shape, sparsity, dtype):
    weight, mask = random_weight(shape, sparsity)
    if form == "blocks":
        sizes = [size for size in (64, 32, 16) if shape[0] % size == 0 and shape[1] % size == 0]
        mask = mask[: shape[0] // sizes[0], : shape[1] // sizes[0]]
        mask = mask.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[0], 1)
        weight = random_weight(shape, 0.0)[0] * mask
    weight = weight.to(dtype)
    return weight, pack(form, dense_to_csr(weight.to(DEVICE), mask.to(DEVICE)), shape)


def inputs(tokens, inner, dtype, gap=0):
    x = torch.randn(tokens, inner + gap, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    return x[:, :inner]


def assert_accurate(form, shape, sparsity, dtype, tokens, *, activation="none", has_bias=True, gap=0):
    weight, parts = packed(form, shape, sparsity, dtype)
    x = inputs(tokens, shape[1], dtype, gap)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).to(dtype) if has_bias else None
    on_device = None if bias is None else bias.to(DEVICE)
    y = linear(x.to(DEVICE), parts, form, shape, on_device, activation).cpu()
    assert (y.dtype, y.shape) == (dtype, (tokens, shape[0]))
    exact, allowed = exact_and_allowed_error(x, weight, bias, None if activation == "none" else activation)
    error = (y.double() - exact).abs()
    assert bool((error <= allowed).all()), f"{shape} {sparsity} {tokens} {activation}: error {error.max():.3g}"


def test_the_tables_name_every_form():
    assert set(SHAPES) == set(TOKENS) == set(KERNELS) == set(gpu.FORMS) - {"2:4"}
    assert all(math.gcd(len(tokens), len(SPARSITIES)) == 1 for tokens in TOKENS.values())


@pytest.mark.parametrize("dtype", gpu.DTYPES)
@pytest.mark.parametrize("form", KERNELS)
def test_as_accurate_as_torch(form, dtype):
    """Each kernel meets each sparsity, an empty row where there are several, each activation, and gaps between rows."""
    reached = set()
    for i, (shape, sparsity) in enumerate(itertools.product(SHAPES[form], SPARSITIES)):
        with seen() as launches:
            tokens, activation = TOKENS[form][i % len(TOKENS[form])], ACTIVATED[(i + i // 4) % len(ACTIVATED)]
            gap = (0, 3, 0, 1, 0, 2, 0)[i % 7]
            assert_accurate(form, shape, sparsity, dtype, tokens, activation=activation, has_bias=i % 3 > 0, gap=gap)
        reached |= {(launch.name, sparsity) for launch in launches}
    assert {name for name, _ in reached} == KERNELS[form]
    assert reached >= set(itertools.product(KERNELS[form] - {"epilogue.finish"}, SPARSITIES))


@pytest.mark.parametrize("form", ["tiles", "narrow"])
def test_a_weight_packed_for_one_token_takes_a_prompt_of_any_length(form):
    for tokens in (4, 8, 16, 32, 100, 128):
        assert_accurate(form, (2, 65), 0.8, torch.bfloat16, tokens)


@pytest.mark.parametrize("form", KERNELS)
def test_the_same_call_gives_the_same_bits_and_some_rows_are_those_of_all(form):
    shape = SHAPES[form][-1]
    rows = (shape[0] // 2, shape[0] - shape[0] // 4)
    _, parts = packed(form, shape, 0.7, torch.float32)
    bias = torch.randn(shape[0], device=DEVICE)
    for n in TOKENS[form]:
        x = inputs(n, shape[1], torch.float32).to(DEVICE)
        whole = linear(x, parts, form, shape, bias, "silu")
        torch.empty_like(whole).fill_(torch.nan)  # where the next output will lie, if memory is reused
        assert torch.equal(linear(x, parts, form, shape, bias, "silu"), whole)
        assert bool(whole.isfinite().all())
        some = linear(x, parts, form, shape, bias, "silu", rows)
        torch.testing.assert_close(some, whole[:, slice(*rows)])


@pytest.mark.parametrize("dtype", gpu.DTYPES)
@pytest.mark.parametrize("form", ["tiles", "narrow"])
def test_expansion_is_exact_for_any_bits(form, dtype):
    shape = (6, 300)
    weight, mask = random_weight(shape, 0.6)
    weight = weight.clone().to(dtype)
    special = torch.tensor([torch.nan, -0.0, torch.inf, -torch.inf, 1e-7], dtype=dtype)
    where = mask.nonzero()[:5]
    weight[where[:, 0], where[:, 1]] = special
    parts = pack(form, dense_to_csr(weight.to(DEVICE), mask.to(DEVICE)), shape)
    expanded = gpu.dense(form, *parts, shape, (0, 6)).cpu()
    assert torch.equal(expanded.view(torch.uint8), torch.where(mask, weight, 0).view(torch.uint8))


@pytest.mark.parametrize("form", ["tiles", "narrow"])
def test_rows_too_long_for_starts_of_16_bits(form):
    assert_accurate(form, (1, 65600), 0.99, torch.float32, 1)


def test_a_removed_weight_of_narrow_has_no_part_in_the_sum():
    _, parts = packed("narrow", (9, 300), 0.8, torch.float32)
    mask = random_weight((9, 300), 0.8)[1]
    x = inputs(2, 300, torch.float32)
    x[1, 7] = torch.inf
    y = linear(x.to(DEVICE), parts, "narrow", (9, 300)).cpu()
    assert bool(y[0].isfinite().all())
    assert torch.equal(y[1].isfinite(), ~mask[:, 7])


def test_activations_have_a_number_each():
    """The kernels know them by these."""
    assert list(ACTIVATIONS) == ["none", "relu", "gelu", "gelu_tanh", "silu", "hardswish", "relu6"]

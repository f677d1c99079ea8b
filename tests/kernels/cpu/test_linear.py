"""linear: every kernel, form and dtype against float64 over the table, and which input an output depends on."""

import itertools
import os
import struct
import subprocess
import sys

import pytest
import torch
from table import (
    DTYPES,
    FORMS,
    SHAPES,
    SPARSITIES,
    TOKENS,
    TOKENS_PER_WEIGHT,
    assert_as_accurate_as_torch,
    before_a_guard_page,
    cases,
    exact_and_allowed_error,
    pack,
    packed_random_weight,
    random_weight,
)
from torch import Tensor

from sparsify.kernels.cpu import library as native

every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def variants(form: str, index: Tensor) -> set:
    """The kernels inside a form that an index reaches: each combination has code of its own."""
    blob = bytes(index.tolist())
    if form in ("gather", "sell"):
        steps_per_window, padded = struct.unpack_from("<II", blob, 4)
        (lanes,) = struct.unpack_from("<I", blob, 20)
        return {(lanes, steps_per_window, padded)}
    if form == "panel":
        (out,), (k_block, window_rows) = struct.unpack_from("<q", blob, 8), struct.unpack_from("<HH", blob, 4)
        (in_,) = struct.unpack_from("<q", blob, 16)
        n_blocks, n_windows = max(1, -(-in_ // k_block)), -(-out // window_rows)
        first = 64 + 16 * (n_blocks * n_windows + 1)
        cells = blob[first : first + n_blocks * -(-out // 16) * 16 // 4 * 8]
        runs = {name for i, name in enumerate(("quads", "triples", "pairs", "singles")) if any(cells[i::8])}
        return runs | ({"blocks"} if n_blocks > 1 else set()) | ({"windows"} if n_windows > 1 else set())
    return {form}


EVERY_VARIANT = {
    "panel": {"quads", "triples", "pairs", "singles", "blocks", "windows"},
    "bitmask": {"bitmask"},
    "gather": {(16, 6, 1), (16, 6, 0), (16, 3, 1), (16, 3, 0)},
    "sell": {(8, 1, 1)},
}
NARROW_GATHER = {(8, 1, 1), (8, 1, 0)}  # of AVX2


def every_variant(form: str) -> set:
    """The kernels inside a form that an index packed for the instruction set in use can reach."""
    narrow = form == "gather" and native.kernel() in ("avx2", "avxvnni")
    return NARROW_GATHER if narrow else EVERY_VARIANT[form]


def test_a_kernel_that_was_set_is_in_use(kernel):
    assert native.kernel() == kernel


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match=r"known: .*portable"):
        native.set_kernel("sse9")


_exact = {}  # what the table's cases should give, by (dtype, case): the same for every kernel and form


@every_dtype
@every_form
def test_linear_over_the_table(kernel, form, dtype):
    reached, seen_tokens, n_cases = set(), set(), 0
    for shape, sparsity, tokens, activation, with_bias, gap in cases():
        out, in_ = shape
        weight = random_weight(shape, sparsity)[0].to(dtype)
        packed = packed_random_weight(form, shape, sparsity, dtype, own=n_cases % 2 == 0)
        generator = torch.Generator().manual_seed(n_cases)
        x = torch.randn(tokens, in_ + gap, generator=generator).to(dtype)[:, :in_]
        bias = torch.randn(out, generator=generator).to(dtype) if with_bias else None
        y = torch.full((tokens, out + 5), float("nan"), dtype=dtype)
        native.linear(form, x, *packed, bias, shape, native.ACTIVATIONS[activation], out=y[:, :out])
        key = (dtype, n_cases)
        if key not in _exact:
            _exact[key] = exact_and_allowed_error(x, weight, bias, activation)
        exact, allowed = _exact[key]
        error = (y[:, :out].double() - exact).abs()
        assert bool((error <= allowed).all()), f"error {error.max():.3g}, allowed {allowed.max():.3g}"
        assert bool(y[:, out:].isnan().all()), "wrote beside the output"
        reached |= variants(form, packed[0])
        seen_tokens.add(tokens)
        n_cases += 1
    assert n_cases == len(SHAPES) * len(SPARSITIES) * TOKENS_PER_WEIGHT
    assert seen_tokens == set(TOKENS)
    assert reached == every_variant(form), "a kernel of the form was never reached"


@every_form
def test_wide_rows_stay_accurate(kernel, form):
    for sparsity in (0.0, 0.5, 0.9):
        weight, mask = random_weight((32, 9000), sparsity)
        x = torch.randn(3, 9000, generator=torch.Generator().manual_seed(1))
        y = native.linear(form, x, *pack(form, weight, mask), None, (32, 9000))
        assert_as_accurate_as_torch(y, x, weight, None, None)


@every_form
def test_columns_far_apart(kernel, form):
    mask = torch.zeros(20, 3000, dtype=torch.bool)
    mask[0, 0] = mask[0, 2999] = mask[7, 700] = mask[19, 2968] = mask[18, 2967] = True
    weight = mask * torch.arange(1.0, 21).unsqueeze(1)
    for tokens in (2, 20):
        x = torch.arange(3000.0).expand(tokens, 3000)
        y = native.linear(form, x, *pack(form, weight, mask), None, (20, 3000))
        assert torch.equal(y, x @ weight.T)


@pytest.mark.parametrize("name", ["sse9", "portable"])
def test_the_environment_forces_a_kernel(name):
    program = (
        "import torch\n"
        "from sparsify.kernels.cpu import library as native\n"
        "packed = native.pack('panel', torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))\n"
        "print(native.linear('panel', torch.ones(1, 1), *packed, None, (1, 1)).item(), native.kernel())\n"
    )
    environment = {**os.environ, "SPARSIFY_KERNEL": name, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if name == "portable":
        assert done.stdout.split() == ["1.0", name], done.stderr
    else:
        assert "SPARSIFY_KERNEL=sse9: unknown kernel; known: " in done.stderr


@every_dtype
@every_form
def test_an_index_packed_for_another_instruction_set(kernel, form, dtype):
    """A layer may be packed on one machine and copied to another: any kernel multiplies, within the same memory."""
    here = [name for name in native.known_kernels() if _runs_here(name)]
    for name, (shape, sparsity), tokens in itertools.product(
        here, (((131, 257), 0.5), ((33, 1003), 0.9), ((5, 6), 0.3)), (1, 4, 9)
    ):
        weight = random_weight(shape, sparsity)[0].to(dtype)
        native.set_kernel(name)
        index, values = (before_a_guard_page(part) for part in packed_random_weight(form, shape, sparsity, dtype))
        native.set_kernel(kernel)
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        y = native.linear(form, before_a_guard_page(x), index, values, None, shape)
        assert_as_accurate_as_torch(y, x, weight, None, None)
    assert kernel in here


def _runs_here(kernel: str) -> bool:
    before = native.kernel()
    try:
        native.set_kernel(kernel)
    except ValueError:
        return False
    native.set_kernel(before)
    return True


@every_dtype
@every_form
def test_leading_dimensions_and_layouts(kernel, form, dtype):
    weight = random_weight((33, 70), 0.6)[0].to(dtype)
    packed = packed_random_weight(form, (33, 70), 0.6, dtype)
    x = torch.randn(4, 3, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    flat = native.linear(form, x.reshape(12, 70), *packed, None, (33, 70))
    assert_as_accurate_as_torch(flat, x.reshape(12, 70), weight, None, None)
    assert torch.equal(native.linear(form, x, *packed, None, (33, 70)), flat.view(4, 3, 33))
    assert torch.equal(native.linear(form, x[1, 2], *packed, None, (33, 70)), flat[5])
    assert torch.equal(native.linear(form, x.reshape(12, 70).T.contiguous().T, *packed, None, (33, 70)), flat)
    assert torch.equal(
        native.linear(form, x.transpose(0, 1), *packed, None, (33, 70)), flat.view(4, 3, 33).transpose(0, 1)
    )
    assert native.linear(form, x[:0], *packed, None, (33, 70)).shape == (0, 3, 33)


@every_dtype
@every_form
def test_a_token_does_not_depend_on_its_company_nor_on_strides_nor_on_threads(kernel, form, dtype):
    for shape, sparsity in itertools.product(((70, 90), (256, 512)), (0.5, 0.9)):
        packed = packed_random_weight(form, shape, sparsity, dtype)
        x = torch.randn(200, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
        together = native.linear(form, x, *packed, None, shape)
        for n in (1, 2, 3, 5, 8, 16, 33, 64):
            assert torch.equal(native.linear(form, x[:n], *packed, None, shape), together[:n])
        wide = torch.cat([x, x], 1)[:, : shape[1]]
        assert torch.equal(native.linear(form, wide, *packed, None, shape), together)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                assert torch.equal(native.linear(form, x, *packed, None, shape), together)
        finally:
            torch.set_num_threads(before)


@every_dtype
@every_form
def test_some_rows_are_that_part_of_all_rows(kernel, form, dtype):
    """Rows within, at and across the ends of tiles, blocks and windows."""
    for shape, ranges in (
        ((300, 130), [(0, 1), (1, 300), (63, 65), (64, 128), (100, 200), (128, 256), (299, 300), (17, 17)]),
        ((17, 33), [(0, 16), (16, 17), (3, 11)]),
    ):
        packed = packed_random_weight(form, shape, 0.7, dtype)
        generator = torch.Generator().manual_seed(0)
        bias = torch.randn(shape[0], generator=generator).to(dtype)
        for tokens, gelu in ((1, 0), (7, 2), (40, 0), (130, 2)):
            x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
            whole = native.linear(form, x, *packed, bias, shape, gelu)
            for first, end in ranges:
                y = torch.full((tokens, end - first + 3), float("nan"), dtype=dtype)
                native.linear(form, x, *packed, bias, shape, gelu, out=y[:, : end - first], rows=(first, end))
                assert torch.equal(y[:, : end - first], whole[:, first:end])
                assert bool(y[:, end - first :].isnan().all()), "wrote beside the output"
                assert torch.equal(
                    native.linear(form, x, *packed, bias, shape, gelu, rows=(first, end)), whole[:, first:end]
                )


@every_dtype
@every_form
def test_inf_and_nan_reach_only_the_outputs_that_keep_their_column(kernel, form, dtype):
    n_masked, shape, reached = 0, (64, 130), set()
    for sparsity, tokens, bad in itertools.product((0.3, 0.6, 0.75, 0.95), (1, 9), (float("inf"), float("nan"))):
        mask = random_weight(shape, sparsity)[1]
        packed = packed_random_weight(form, shape, sparsity, dtype)
        reached |= variants(form, packed[0])
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
    if form == "gather":  # padding slots are where this goes wrong
        assert reached >= every_variant(form) - {(16, 6, 0)}


@every_dtype
@every_form
def test_nothing_in_or_out_or_no_token(kernel, form, dtype):
    for out, in_, tokens in ((3, 0, 2), (40, 0, 1), (0, 3, 2), (0, 0, 2), (3, 4, 0)):
        packed = pack(form, torch.zeros(out, in_, dtype=dtype), torch.zeros(out, in_, dtype=torch.bool))
        x, bias = torch.zeros(tokens, in_, dtype=dtype), torch.ones(out, dtype=dtype)
        y = native.linear(form, x, *packed, bias, (out, in_))
        assert y.shape == (tokens, out)
        assert bool((y == 1).all())


@every_form
def test_inf_weights_meet_only_their_own_activation(kernel, form):
    weight, mask = (t.clone() for t in random_weight((20, 70), 0.6))
    weight[4, mask[4].nonzero()[0]] = float("inf")
    y = native.linear(form, torch.ones(3, 70), *pack(form, weight, mask), None, (20, 70))
    assert bool((y[:, 4] == float("inf")).all())
    assert bool(y[:, torch.arange(20) != 4].isfinite().all())

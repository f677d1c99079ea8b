"""Two exported linear layers with an activation between are one call, and their outputs the bits of two calls."""

import copy
import itertools

import pytest
import torch
from tested_kernels import needs_native
from torch import nn

import sparsify
from sparsify.kernels import mlp_op

pytestmark = [needs_native, pytest.mark.usefixtures("small_outputs_count", "few_tokens_count")]

ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU()}


class Block(nn.Module):
    """A block whose children are called from its own forward."""

    def __init__(self, body):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def masked(model, dtype=torch.float32):
    torch.manual_seed(0)
    return sparsify.prune(sparsify.convert(model.to(dtype)), 0.5, method="random", seed=0).eval()


def mlp(act=None, *between):
    return nn.Sequential(nn.Linear(16, 32), act or nn.GELU(), *between, nn.Linear(32, 24))


def both_ways(model, format="panel", **options):
    """Export a model; return it, and a copy whose layers apply activations but are calls of their own."""
    fast = sparsify.export(model, format=format, **options)
    plain = copy.deepcopy(fast)
    for module in plain.modules():
        if isinstance(module, sparsify.CSRLinear):
            module.feeds_linear = False
    return fast, plain


WEIGHTS = {
    "float": {},
    "int8-weights": {"quantize": "int8-weights"},
    **{form: {"format": form, "quantize": "int8"} for form in ("quads", "quadmask", "quadsteps")},
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("between", [(), (nn.Dropout(0.5), nn.Identity())], ids=["plain", "dropout"])
def test_the_bits_of_two_calls(name, between, dtype, weights, calls):
    options = WEIGHTS[weights] | ({"max_error": 1.0} if WEIGHTS[weights] else {})
    fast, plain = both_ways(masked(mlp(ACTIVATIONS[name], *between), dtype), **options)
    for shape in ((5, 16), (2, 3, 16), (0, 16), (131, 16)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            found, wanted = fast(x), plain(x)
        assert torch.equal(found, wanted)
        assert type(found) is torch.Tensor
        strided = x.repeat_interleave(2, dim=-1)[..., ::2]
        with torch.inference_mode():
            assert torch.equal(fast(strided), wanted)
    assert calls == [(24, 32)] * 6, "no call for an input without rows"


@pytest.mark.parametrize("sizes", [(16, 32, 32, 8, 4), (16, 16, 16, 16, 16)])
def test_chains_of_layers(sizes, calls):
    linears = [nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(sizes)]
    layers = [linears[0], nn.GELU(), linears[1], nn.ReLU(), linears[2], nn.SiLU(), linears[3], nn.SiLU()]
    fast, plain = both_ways(masked(nn.Sequential(*layers)))
    x = torch.randn(9, 16)
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))
    assert calls == [(sizes[2], sizes[1]), (sizes[4], sizes[3])]


def test_copies_are_fused_too(calls):
    fast, plain = both_ways(masked(mlp()))
    x = torch.randn(9, 16)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fast)(x), plain(x))
    assert calls == [(24, 32)]


def used_twice(block, x):
    hidden = block.act(block.fc1(x))
    return block.fc2(hidden) + hidden.sum()


def a_part(block, x):
    return block.fc2(block.act(block.fc1(x))[:2])


def scaled(block, x):
    return block.fc2(block.act(block.fc1(x)) * 2)


@pytest.mark.parametrize("body", [used_twice, a_part, scaled])
def test_other_readers_get_the_activation(body, calls):
    fast, plain = both_ways(masked(Block(body)))
    x = torch.randn(9, 16)
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))
    assert calls == []


def test_hooks_see_what_there_is(calls):
    fast, plain = both_ways(masked(mlp()))
    x, seen = torch.randn(9, 16), []
    with torch.no_grad():
        hidden, wanted = plain[:2](x), plain(x)
        handle = fast[1].register_forward_hook(lambda module, args, output: seen.append(output))
        assert torch.equal(fast(x), wanted)
        torch.testing.assert_close(seen[0] + 0, hidden)
        handle.remove()
        fast[0].register_forward_hook(lambda module, args, output: seen.append(output))
        torch.testing.assert_close(fast(x), wanted)
    assert calls == [(24, 32)], "of the first call"


@pytest.mark.parametrize("mode", ["gradients", "autocast", "few tokens", "another form"])
def test_two_calls_where_one_would_not_do(mode, calls, monkeypatch):
    model = masked(mlp())
    fast, plain = both_ways(model)
    x = torch.randn(9, 16, requires_grad=mode == "gradients")
    if mode == "few tokens":
        monkeypatch.setattr(mlp_op, "FEWEST_TOKENS", 10)
    if mode == "another form":
        fast = sparsify.export(model, format="bitmask")
    with torch.set_grad_enabled(mode == "gradients"), torch.autocast("cpu", enabled=mode == "autocast"):
        found, wanted = fast(x), plain(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found.dtype == wanted.dtype
    assert found.requires_grad == wanted.requires_grad
    assert calls == []


def changed_before_the_activation(block, x):
    hidden = block.fc1(x)
    x.add_(1)
    return block.fc2(block.act(hidden))


def changed_after_the_activation(block, x):
    hidden = block.act(block.fc1(x))
    x += 1
    return block.fc2(hidden)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("body", [changed_before_the_activation, changed_after_the_activation])
def test_an_input_changed_in_between_is_not_read_late(body, mode, calls):
    """Tensors of inference mode have no record of their changes, so no check when the input is read."""
    model = masked(Block(body))
    fast = sparsify.export(model, format="panel")
    with mode():
        x = torch.randn(9, 16)
        torch.testing.assert_close(fast(x.clone()), model(x.clone()))
    assert calls == []


def test_a_module_that_changes_its_input_may_stand_between():
    def body(block, x):
        hidden = block.fc1(x)
        block.other(x)
        return block.fc2(block.act(hidden))

    block = Block(body)
    block.other = nn.ReLU(inplace=True)
    model = masked(block)
    fast = sparsify.export(model, format="panel")
    with torch.inference_mode():
        x = torch.randn(9, 16)
        torch.testing.assert_close(fast(x.clone()), model(x.clone()))


def test_tensors_that_do_not_fit_are_refused_as_in_two_calls():
    fast, _ = both_ways(masked(mlp()))
    fast[3 - 1].bias = nn.Parameter(torch.zeros(24, dtype=torch.float64))
    with torch.no_grad(), pytest.raises(RuntimeError, match="the bias must be"):
        fast(torch.randn(9, 16))
    fast, _ = both_ways(masked(mlp()))
    fast[0].index = torch.zeros_like(fast[0].index)
    with torch.no_grad(), pytest.raises(ValueError, match="damaged"):
        fast(torch.randn(9, 16))


def test_one_call_is_taken_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(mlp_op, "FEWEST_TOKENS", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [mlp_op.is_worthwhile("panel", tokens, 192) for tokens in (127, 128)] == [False, True]
    assert [mlp_op.is_worthwhile("panel", 512, ends) for ends in (4096, 4097)] == [True, False]
    assert [mlp_op.is_worthwhile("quads", 512, ends) for ends in (2048, 2049)] == [True, False]
    assert not mlp_op.is_worthwhile("gather", 512, 192)

"""An activation that a module returns stays deferred where the next module begins with an exported linear layer."""

import copy

import pytest
import torch
from tested_kernels import needs_native
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

import sparsify
from sparsify.layers import deferred

pytestmark = [needs_native, pytest.mark.usefixtures("small_outputs_count", "few_tokens_count")]


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.act = nn.Linear(16, 32), nn.GELU()

    def forward(self, x):
        return self.act(self.dense(x))


class Down(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, hidden, x):
        return self.norm(self.dense(hidden) + x)


class Block(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.up, self.down = Up(), Down()
        self.body = body

    def forward(self, x, mask=None, **kwargs):
        return self.body(self, x)


def plain_body(block, x):
    return block.down(block.up(x), x)


def exported(model, **options):
    """Export a model; return it, and a copy without anything deferred."""
    torch.manual_seed(0)
    masked = sparsify.prune(sparsify.convert(model), 0.5, method="random", seed=0).eval()
    return (
        sparsify.export(masked, format="panel", **options),
        sparsify.export(masked, format="panel", fuse=False, **options),
    )


def passes_on(model):
    return [m for m in model.modules() if deferred.pass_on in m._forward_hooks.values()]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_two_modules_are_one_call(mode, calls):
    fast, plain = exported(nn.Sequential(Block(plain_body), Block(plain_body)))
    x = torch.randn(9, 16)
    with mode():
        found = fast(x)
        torch.testing.assert_close(found, plain(x))
        assert type(found) is torch.Tensor
        assert torch.equal(copy.deepcopy(fast)(x), found)
    assert calls == [(16, 32)] * 4


@pytest.mark.parametrize("kind", [(BertConfig, BertModel), (RobertaConfig, RobertaModel)], ids=["bert", "roberta"])
def test_models_of_transformers(kind, calls):
    config, model = kind
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64}
    fast, plain = exported(model(config(num_hidden_layers=2, num_attention_heads=2, **sizes)))
    x = torch.arange(30).view(2, 15)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x)[0], plain(x)[0])
    assert calls == [(32, 64)] * 2


def read_twice(block, x):
    hidden = block.up(x)
    return block.down(hidden, x) + hidden.mean()


def given_twice(block, x):
    hidden = block.up(x)
    return block.down.norm(block.down(hidden, hidden[..., :16]))


def changed_between(block, x):
    hidden = block.up(x)
    x += 1
    return block.down(hidden, x)


def scaled_between(block, x):
    return block.down(block.up(x) * 2, x)


def by_name(block, x):
    return block.down(x=x, hidden=block.up(x))


@pytest.mark.parametrize("body", [read_twice, given_twice, changed_between, scaled_between, by_name])
def test_another_use_is_not_deferred(body, calls):
    fast, plain = exported(Block(body))
    assert passes_on(fast) == []
    x = torch.randn(9, 16)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x.clone()), plain(x.clone()))
    assert calls == []


def test_a_module_that_reads_its_input_first_gets_plain_outputs(calls):
    class Reads(Down):
        def forward(self, hidden, x):
            return self.norm(self.dense(hidden) + hidden.mean() + x)

    block = Block(plain_body)
    block.down = Reads()
    fast, plain = exported(block)
    assert passes_on(fast) == []
    x = torch.randn(9, 16)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), plain(x))
    assert calls == []


def test_alone_or_in_another_module_the_output_is_plain():
    fast, plain = exported(Block(plain_body))
    x = torch.randn(9, 16)
    with torch.inference_mode():
        wanted = plain.up(x)
        for found in (fast.up(x), nn.Sequential(fast.up)(x)):
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, wanted)


def test_a_module_whose_code_was_changed_since_gets_a_right_output(calls):
    fast, plain = exported(Block(plain_body))
    fast.body = plain.body = lambda block, x: block.down(block.up(x), x) + block.up(x).sum()
    x = torch.randn(9, 16)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), plain(x))


def test_an_output_kept_past_its_module_is_computed_by_then():
    fast, plain = exported(Block(plain_body))
    kept = []
    fast.up.register_forward_hook(lambda module, args, output: kept.append(output))
    x = torch.randn(9, 16)
    with torch.inference_mode():
        fast(x)
        wanted = plain.up(x)
        x.zero_()
        torch.testing.assert_close(kept[0] + 0, wanted)


def test_a_failure_in_between_leaves_nothing_behind():
    def fails(block, x):
        return block.down(block.up(x), x[:3])

    fast, plain = exported(Block(plain_body))
    fast.body = fails
    x = torch.randn(9, 16)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="size of tensor"):
            fast(x)
        fast.body = plain_body
        torch.testing.assert_close(fast(x), plain(x))
    assert deferred._RUNS.stack == []


def test_a_watched_module_and_one_in_two_places_are_left_alone():
    block = Block(plain_body)
    block.up.register_forward_hook(lambda module, args, output: None)
    assert passes_on(exported(block)[0]) == []
    block = Block(plain_body)
    block.again = block.up
    assert passes_on(exported(block)[0]) == []


def test_to_dense_takes_the_hooks_off():
    fast, _ = exported(Block(plain_body))
    assert len(passes_on(fast)) == 1
    dense = sparsify.to_dense(fast)
    assert not any(module._forward_hooks for module in dense.modules())

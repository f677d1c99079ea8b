"""Activations that an exported layer applies by itself."""

import copy
import pickle

import pytest
import torch
from tested_kernels import needs_native
from torch import nn
from torch.nn import functional as F

import sparsify
from sparsify.inference.fusion import FusedActivation, activation_name

ACTIVATIONS = {"relu": nn.ReLU(inplace=True), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU()}


class Block(nn.Module):
    """A block as models have them: its children are called from its own forward."""

    def __init__(self, body, act=None):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), act or nn.GELU(), nn.Linear(32, 16)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def masked(model, sparsity=0.5):
    torch.manual_seed(0)
    return sparsify.prune(sparsify.convert(model), sparsity, method="random").eval()


def mlp(act):
    return nn.Sequential(nn.Linear(16, 32), act, nn.Dropout(0.5), nn.Linear(32, 16))


def fused_in(model):
    return [name for name, module in model.named_modules() if isinstance(module, FusedActivation)]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("form", ["csr", pytest.param("panel", marks=needs_native)])
def test_the_layer_applies_what_follows_it(name, form):
    model = masked(mlp(ACTIVATIONS[name]))
    fast = sparsify.export(model, format=form)
    assert fast[0].activation == name
    assert fast[3].activation == "none"
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fast(x), model(x))
    torch.testing.assert_close(fast[1](fast[0](x)), model[1](model[0](x)))
    assert type(model[1]) is type(ACTIVATIONS[name]), "the model itself stays as it was"
    assert list(fast.state_dict()) == [f"{i}.{key}" for i in (0, 3) for key in ("bias", "crow", "col", "values")], (
        "no key is added"
    )


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.fc2(m.act(m.fc1(x)) + m.fc1(x)),  # the layer is called twice
        lambda m, x: m.fc2(m.act(m.fc1(x)) + m.act(-x).sum()),  # the activation is called twice
        lambda m, x: (lambda h: m.fc2(m.act(h) + h))(m.fc1(x)),  # the sum itself is needed too
        lambda m, x: m.fc2(m.act(m.fc1(x).abs())),
        lambda m, x: m.fc2(m.act(m.fc1(x)) if m.training else F.relu(m.fc1(x))),
        lambda m, x: m.fc2(m.act(m.fc1(x)) if x.sum() > 0 else m.fc1(x)),  # cannot be traced
    ],
)
def test_left_alone_where_something_else_may_see_the_sum(body):
    model = masked(Block(body))
    fast = sparsify.export(model, format="csr")
    assert not fused_in(fast)
    for x in (torch.randn(3, 16), -torch.randn(3, 16).abs()):
        assert torch.equal(fast(x), model(x))


def test_fused_in_a_module_of_ones_own():
    model = masked(Block(lambda m, x: m.fc2(m.act(m.fc1(x)))))
    fast = sparsify.export(model, format="csr")
    assert fused_in(fast) == ["act"]
    assert fast.fc1.activation == "gelu"
    x = torch.randn(3, 16)
    assert torch.equal(fast(x), model(x))


def test_hooks_and_shared_modules_are_left_alone():
    shared = nn.ReLU()
    model = masked(nn.Sequential(nn.Linear(16, 16), shared, nn.Linear(16, 16), shared))
    assert not fused_in(sparsify.export(model, format="csr"))
    seen = []
    model = masked(mlp(nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert not fused_in(sparsify.export(model, format="csr"))


def test_another_layer_in_the_place_is_not_left_without_its_activation():
    model = masked(mlp(nn.ReLU()))
    x = torch.randn(4, 16)
    expected = model(x)
    for change in (lambda m: m.__setitem__(0, copy.deepcopy(model[0])), sparsify.to_dense):
        fast = sparsify.export(model, format="csr")
        change(fast)
        assert torch.equal(fast(x), expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_their_own(again):
    model = masked(mlp(nn.GELU()))
    fast = sparsify.export(model, format="csr")
    other = again(fast)
    assert other[1].owner[0] is other
    other[0] = copy.deepcopy(model[0])
    x = torch.randn(4, 16)
    assert torch.equal(other(x), model(x))
    assert torch.equal(fast(x), model(x))


def test_compiles_in_one_graph():
    fast = sparsify.export(masked(mlp(nn.GELU())), format="csr")
    x = torch.randn(4, 16)
    assert torch.equal(torch.compile(fast, fullgraph=True, backend="eager")(x), fast(x))


def test_a_file_loads_fused(tmp_path):
    fast = sparsify.export(masked(mlp(nn.GELU())), format="csr")
    sparsify.save(fast, tmp_path / "m.safetensors")
    loaded = sparsify.load(tmp_path / "m.safetensors", mlp(nn.GELU()).eval())
    x = torch.randn(4, 16)
    assert fused_in(loaded) == ["1"]
    assert torch.equal(loaded(x), fast(x))


def test_the_report_says_so():
    fast = sparsify.export(masked(mlp(nn.GELU())), format="csr")
    assert [row.reason for row in sparsify.report(fast)] == ["asked for; applies gelu", "asked for"]


def test_transformers_activations_are_recognised_by_what_they_compute():
    activations = pytest.importorskip("transformers.activations", reason="needs transformers")
    names = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "relu": "relu", "gelu_new": None}
    assert {name: activation_name(activations.ACT2FN[name]) for name in names} == names

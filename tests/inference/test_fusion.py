"""Activations that an exported layer works out together with its output, where nothing else may see that."""

import copy
import pickle
import threading

import pytest
import torch
from tested_kernels import needs_native
from torch import nn
from torch.nn import functional as F

import sparsify
from sparsify.inference import fusion
from sparsify.inference.fusion import activation_name
from sparsify.layers import csr_linear, deferred

pytestmark = pytest.mark.usefixtures("small_outputs_count")

ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "relu6": nn.ReLU6(),
}


class Block(nn.Module):
    """A block as models have them: its children are called from its own forward."""

    def __init__(self, body, act=None):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), act or nn.GELU(), nn.Linear(32, 16)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


@pytest.fixture
def computed(monkeypatch):
    """Return the activations that kernels have worked out, as a list that grows."""
    names, linear = [], csr_linear.linear

    def spy(*args):
        names.append(args[5])
        return linear(*args)

    monkeypatch.setattr(csr_linear, "linear", spy)
    return names


def masked(model, sparsity=0.5):
    torch.manual_seed(0)
    return sparsify.prune(sparsify.convert(model), sparsity, method="random").eval()


def mlp(act):
    return nn.Sequential(nn.Linear(16, 32), act, nn.Dropout(0.5), nn.Linear(32, 16))


def fused_in(model):
    return {name: m.followed_by for name, m in model.named_modules() if getattr(m, "followed_by", "none") != "none"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("form", ["csr", pytest.param("panel", marks=needs_native)])
def test_the_layer_applies_what_follows_it(name, form, mode, computed):
    model = masked(mlp(ACTIVATIONS[name]))
    fast = sparsify.export(model, format=form)
    assert fused_in(fast) == {"0": name}
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    with mode():
        found = fast(x)
    assert computed == [name, "none"]
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, model(x).detach())
    assert [type(module) for module in fast[1:3]] == [type(module) for module in model[1:3]]
    assert not model._forward_hooks, "the model itself stays as it was"
    assert list(fast.state_dict()) == [f"{i}.{key}" for i in (0, 3) for key in ("bias", "crow", "col", "values")], (
        "no key is added"
    )


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_whoever_uses_a_part_gets_what_the_masked_model_gives(name, mode):
    model, x = masked(mlp(ACTIVATIONS[name])), torch.randn(4, 16)
    fast = sparsify.export(model, format="csr")
    with mode():
        close(fast[:1](x), model[:1](x))
        close(fast[0](x), model[0](x))
        close(fast[1](torch.tensor([-1.0, 2.0])), model[1](torch.tensor([-1.0, 2.0])))
        seen, wanted = [], model[0](x)
        handles = [
            fast[0].register_forward_hook(lambda module, args, output: seen.append(output)),
            fast[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone())),
        ]
        close(fast(x), model(x))
        close(seen[1], wanted)
        if name != "relu":  # which works in place
            close(seen[0], wanted)
        for handle in handles:
            handle.remove()
        fast[1], other = nn.LeakyReLU(0.3), nn.Sequential(model[0], nn.LeakyReLU(0.3), *model[2:])
        close(fast(x), other(x))
        fast[1] = nn.Identity()
        close(fast(x), nn.Sequential(model[0], *model[2:])(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_hooks_of_all_modules_see_the_output_before_the_activation(mode):
    model, x, seen = masked(mlp(nn.GELU())), torch.randn(4, 16), []
    fast = sparsify.export(model, format="csr")
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with mode():
            fast(x)
    finally:
        handle.remove()
    with mode():
        close(seen[0] + 0, model[0](x))
        close(seen[1], model[1](model[0](x)))


class Flagged(nn.Module):
    """A block with a flag that says what becomes of its first layer's output."""

    def __init__(self):
        super().__init__()
        self.fc, self.act, self.flag, self.kept = nn.Linear(16, 32), nn.ReLU(), "", None

    def forward(self, x):
        y = self.fc(x)
        if self.flag == "features":
            return y
        if self.flag == "both":
            return self.act(y), y
        if self.flag == "keep":
            self.kept = y
        if self.flag == "sum":
            return self.act(y) + y
        if self.flag == "in place":
            return y.add_(1), self.act(y), y
        return self.act(y)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("flag", ["features", "both", "keep", "sum", "in place", ""])
def test_flags_that_are_set_later_count(flag, mode, inplace):
    model, x = masked(Flagged()), torch.randn(4, 16)
    fast = sparsify.export(model, format="csr")
    assert fused_in(fast) == {"fc": "relu"}
    for block in (model, fast):
        block.flag, block.act.inplace = flag, inplace
    with mode():
        given = x.clone()
        found, wanted = fast(given), model(given)
        given.zero_()  # a buffer that is used again
    close(found, wanted)
    if flag == "keep":
        close(fast.kept + 0, model.kept)
    close(fast.train()(x), model.train()(x))


def test_an_input_changed_before_the_output_is_used_is_an_error():
    def change(block, x):
        y = block.fc1(x)
        x.add_(1)
        return block.fc2(block.act(y))

    model = masked(Block(lambda block, x: block.fc2(block.act(block.fc1(x)))))
    fast = sparsify.export(model, format="csr")
    fast.body = change
    with torch.no_grad(), pytest.raises(RuntimeError, match="changed in place before its output was used"):
        fast(torch.randn(3, 16))


def test_an_output_is_a_tensor_for_all_code():
    fast = sparsify.export(masked(Flagged()), format="csr")
    x, wanted = torch.randn(4, 16), fast.fc(torch.zeros(1, 16)).shape[1]
    found = []
    fast.act = nn.Identity()
    fast.act.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        fast(x)
        (y,), plain = found, fast.fc(x)
    assert (y.shape, y.dtype, y.dim(), len(y), y.device) == ((4, wanted), torch.float32, 2, 4, x.device)
    for made, expected in (
        (y.relu(), plain.relu()),
        (torch.relu(input=y), plain.relu()),
        (F.gelu(y, approximate="tanh"), F.gelu(plain, approximate="tanh")),
        (F.silu(y), F.silu(plain)),
        (F.hardswish(y), F.hardswish(plain)),
        (F.relu6(y), F.relu6(plain)),
        (F.hardtanh(y, 0, 6), F.relu6(plain)),
        (F.hardtanh(y, 0, 5), F.hardtanh(plain, 0, 5)),
        (copy.deepcopy(y), plain),
        (pickle.loads(pickle.dumps(y)), plain),
        (torch.cat([y, y]), torch.cat([plain, plain])),
        (torch.from_numpy(y.numpy()), plain),
    ):
        assert type(made) is torch.Tensor
        close(made.detach(), expected.detach())


def test_threads_do_not_defer_for_each_other():
    model = masked(mlp(nn.GELU()))
    fast, x, found = sparsify.export(model, format="csr"), torch.randn(4, 16), []

    def alone():
        with torch.no_grad():
            found.append(fast[0](x))

    def meanwhile(*_):
        thread = threading.Thread(target=alone)
        thread.start()
        thread.join()

    fast[2].register_forward_hook(meanwhile)
    with torch.no_grad():
        fast(x)
    assert type(found[0]) is torch.Tensor


def test_a_run_that_fails_leaves_nothing_deferred():
    fast, x = sparsify.export(masked(mlp(nn.GELU())), format="csr"), torch.randn(4, 16)

    def fail(*_):
        raise KeyboardInterrupt

    handle = fast[2].register_forward_hook(fail)
    for _ in range(3):
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            fast(x)
    handle.remove()
    assert len(deferred._RUNS.stack) <= 1
    with torch.no_grad():
        fast(x)
        assert type(fast[0](x)) is torch.Tensor
    assert not deferred._RUNS.stack


def test_small_outputs_are_not_deferred(monkeypatch, computed):
    monkeypatch.setattr(deferred, "FEWEST_OUTPUTS", 5 * 32 + 1)
    fast = sparsify.export(masked(mlp(nn.GELU())), format="csr")
    with torch.no_grad():
        fast(torch.randn(5, 16))
        fast(torch.randn(6, 16))
    assert computed == ["none", "none", "gelu", "none"]


def test_layers_with_few_outputs_a_row_are_not_fused(monkeypatch):
    model = masked(mlp(nn.GELU()))
    for fewest, found in ((32, {"0": "gelu"}), (33, {})):
        monkeypatch.setattr(fusion, "FEWEST_FEATURES", fewest)
        assert fused_in(sparsify.export(model, format="csr")) == found


def test_under_autocast_an_activation_sees_the_dtype_of_autocast(computed):
    model, x = masked(mlp(nn.GELU())), torch.randn(4, 16)
    fast = sparsify.export(model, format="csr")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16
    assert computed == ["none", "none"]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.fc2(m.act(m.fc1(x)) + m.fc1(x)),  # the layer is called twice
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
    assert fused_in(fast) == {"fc1": "gelu"}
    x = torch.randn(3, 16)
    assert torch.equal(fast(x), model(x))


def test_an_activation_may_be_called_twice():
    model = masked(Block(lambda m, x: m.fc2(m.act(m.fc1(x)) + m.act(-x).sum())))
    fast = sparsify.export(model, format="csr")
    assert fused_in(fast) == {"fc1": "gelu"}
    x = torch.randn(3, 16)
    with torch.no_grad():
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
        with torch.no_grad():
            assert torch.equal(fast(x), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sparsify.to_dense(fast).modules())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_their_own(again):
    model = masked(mlp(nn.GELU()))
    fast = sparsify.export(model, format="csr")
    other = again(fast)
    assert fused_in(other) == {"0": "gelu"}
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
    assert fused_in(loaded) == {"0": "gelu"}
    assert torch.equal(loaded(x), fast(x))


def test_the_report_says_so():
    fast = sparsify.export(masked(mlp(nn.GELU())), format="csr")
    assert [row.reason for row in sparsify.report(fast)] == ["asked for; applies gelu", "asked for"]


def test_transformers_activations_are_recognised_by_what_they_compute():
    activations = pytest.importorskip("transformers.activations", reason="needs transformers")
    names = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "relu": "relu", "gelu_new": None}
    assert {name: activation_name(activations.ACT2FN[name]) for name in names} == names

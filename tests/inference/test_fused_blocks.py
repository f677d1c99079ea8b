"""Convolutions that run with what follows them as one call: right outputs, and the module's own code where in doubt."""

import copy
import io

import pytest
import torch
from tested_kernels import needs_native
from torch import nn
from torch.nn import functional as F

import sparsify
from sparsify.layers.csr_convolution import CSRConvolution
from sparsify.layers.fused_block import FusedBlock

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Bottleneck(nn.Module):
    """A block as in ResNets: one activation module is used several times, and the shortcut may have a convolution."""

    def __init__(self, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 24, 3, stride, padding=1), nn.BatchNorm2d(24, affine=False)
        self.conv3, self.bn3 = nn.Conv2d(24, 16, 1), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(16, 16, 1, stride), nn.BatchNorm2d(16)) if stride > 1 else None

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def masked(model, sparsity=0.7):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    kinds = (nn.Conv1d, nn.Conv2d)
    return sparsify.prune(sparsify.convert(model.eval(), types=kinds), sparsity, method="random")


def images(layout=torch.contiguous_format, seed=1):
    return torch.randn(2, 16, 12, 13, generator=torch.Generator().manual_seed(seed)).to(memory_format=layout)


def close(found, wanted):
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.fixture
def calls(monkeypatch):
    """Return what kernels computed together in fused calls, as a list that grows."""
    made, run = [], CSRConvolution.convolve_fused

    def spy(layer, x, norm, residual, activation, **layout):
        y = run(layer, x, norm, residual, activation, **layout)
        if y is not None:
            made.append((norm is not None, residual is not None, activation))
        return y

    monkeypatch.setattr(CSRConvolution, "convolve_fused", spy)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("sparsity", [0, 0.7, 1])
def test_norm_sum_and_activation_are_one_call_with_the_convolution(layout, mode, sparsity, calls):
    model = masked(nn.Sequential(Bottleneck(), Bottleneck(2)), sparsity)
    fast, plain = (sparsify.export(model, format="panel", fuse=fuse) for fuse in (True, False))
    x, before = images(layout), images(layout)
    with mode():
        wanted = model(x)
        close(fast(x), wanted)
        first = [(True, False, "relu")] * 2
        expected = [*first, (True, True, "relu"), *first, (True, False, "none"), (True, True, "relu")]
        assert calls == ([] if mode is torch.enable_grad else expected)
        assert fast(x).is_contiguous(memory_format=layout)
        del calls[:]
        close(plain(x), wanted)
    assert calls == []
    assert torch.equal(x, before), "the input is left alone"
    assert not any(isinstance(module, FusedBlock) for module in plain.modules())
    assert [fast[1].conv1.followed_by, fast[1].conv3.followed_by] == ["batch_norm, relu", "batch_norm, sum, relu"]
    assert "applies batch_norm, sum, relu" in str(sparsify.report(fast))


def test_files_copies_and_ways_back(tmp_path, calls):
    model, x = masked(Bottleneck(2)), images()
    fast = sparsify.export(model, format="panel")
    assert list(fast.state_dict()) == list(sparsify.export(model, format="panel", fuse=False).state_dict())
    assert type(fast).__name__ == "Bottleneck"
    with torch.no_grad():
        wanted = fast(x)
    path, memory = tmp_path / "fast.safetensors", io.BytesIO()
    sparsify.save(fast, path)
    torch.save(fast, memory)
    memory.seek(0)
    loaded = sparsify.load(path, Bottleneck(2).eval())
    for other in (copy.deepcopy(fast), copy.copy(fast), loaded, torch.load(memory, weights_only=False)):
        del calls[:]
        with torch.no_grad():
            assert torch.equal(other(x), wanted)
        assert len(calls) == 4
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        copied.bn1.running_mean.add_(1)
        assert not torch.equal(copied(x), wanted)
        assert torch.equal(fast(x), wanted)
        again = sparsify.export(fast, format="panel")
        assert torch.equal(again(x), wanted)
        assert torch.equal(sparsify.to_dense(copy.deepcopy(fast))(x), sparsify.to_dense(copy.deepcopy(model))(x))
    dense = sparsify.to_dense(fast)
    assert type(dense) is Bottleneck
    assert not hasattr(dense, "_fused_plan")


def test_numbers_and_modes_of_a_norm_may_change(calls):
    model, x = masked(Bottleneck()), images()
    fast = sparsify.export(model, format="panel")
    for block in (model, fast):
        block.bn1.running_mean.data.fill_(3)
        block.bn1.eps = 0.5
    with torch.no_grad():
        close(fast(x), model(x))
        assert len(calls) == 3
        for block in (model, fast):
            block.bn1.train()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
        assert len(calls) == 5, "the others are fused"
        torch.testing.assert_close(fast.bn1.running_mean, model.bn1.running_mean)


def test_whoever_watches_or_changes_a_part_gets_what_the_code_gives(calls):
    model, x, seen = masked(Bottleneck()), images(), []
    fast = sparsify.export(model, format="panel")
    with torch.no_grad():
        for watched in (fast.bn2, fast.conv1, fast.relu):
            handle = watched.register_forward_hook(lambda module, args, output: seen.append(output + 0))
            close(fast(x), model(x))
            handle.remove()
        assert len(seen) == 5
        close(seen[0], model.bn2(model.conv2(F.relu(model.bn1(model.conv1(x))))))
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output))
        try:
            close(fast(x), model(x))
        finally:
            handle.remove()
        assert len(seen) > 10
        assert calls == []
        close(fast(x), model(x))
        assert len(calls) == 3
        for block in (model, fast):
            block.relu = nn.LeakyReLU(0.3)
        close(fast(x), model(x))
        for block in (model, fast):
            block.relu, block.downsample = nn.ReLU(), nn.Conv2d(16, 16, 1)
        fast.downsample.load_state_dict(model.downsample.state_dict())
        close(fast(x), model(x))
        for block in (model, fast):
            block.bn2 = nn.Identity()
        close(fast(x), model(x))
        assert len(calls) == 3


class Flagged(nn.Module):
    """A block whose code depends on its attributes, in one of several ways."""

    def __init__(self, which):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU()
        self.other = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(16, 16, 1))
        self.which, self.factor, self.names = which, 2.0, ["a", "b"]

    def forward(self, x, flag=None):
        return BODIES[self.which][0](self, x, flag)


def _keeps(self, x, flag):
    self.kept = self.conv(x)
    return self.act(self.bn(self.kept))


def _shortcut_in_place(self, x, flag):
    y = self.bn(self.conv(x))
    return self.act(y + self.other(x))


def _input_in_place(self, x, flag):
    y = self.conv(x)
    x.relu_()
    return self.bn(y) + x


def _adds_to_the_input(self, x, flag):
    x += self.bn(self.conv(x))
    return self.act(x)


BODIES = {
    "plain": (lambda self, x, flag: self.act(self.bn(self.conv(x))), 1),
    "scaled": (lambda self, x, flag: self.act(self.bn(self.conv(x)) * self.factor), 1),
    "flag": (lambda self, x, flag: self.act(self.bn(self.conv(x))) if flag is None else self.conv(x), 1),
    "function": (lambda self, x, flag: F.relu(x + self.bn(self.conv(x)), inplace=True), 1),
    "method": (lambda self, x, flag: self.bn(self.conv(x)).add(x).relu_(), 1),
    "twice": (lambda self, x, flag: self.act(self.conv(self.act(self.conv(x)))), 2),
    "its own": (lambda self, x, flag: (lambda y: y + y)(self.bn(self.conv(x))), 1),
    "of the output": (lambda self, x, flag: (lambda y: y + self.act(y))(self.bn(self.conv(x))), 1),
    "a broadcast": (lambda self, x, flag: self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True), 1),
    "several": (lambda self, x, flag: torch.cat([self.act(self.conv(x)), self.bn(self.conv(x))], dim=1), 2),
    "a list": (lambda self, x, flag: self.act(self.bn(self.conv(x))) + len(self.names), 0),
    "keeps": (_keeps, 0),
    "shortcut in place": (_shortcut_in_place, 1),
    "input in place": (_input_in_place, 0),
    "adds to the input": (_adds_to_the_input, 1),
    "a choice": (lambda self, x, flag: self.act(self.bn(self.conv(x))) if x.sum() > 0 else x, 0),
}


@pytest.mark.parametrize("which", BODIES)
def test_any_code_gives_its_own_answer(which, calls):
    model = masked(Flagged(which))
    fast, n_fused = sparsify.export(model, format="panel"), BODIES[which][1]
    assert "_tensor_constant0" not in fast.__dict__
    with torch.no_grad():
        x, y = images(), images()
        close(fast(x), model(y))
        torch.testing.assert_close(x, y)
        assert len(calls) == n_fused
        for block in (model, fast):
            block.factor, block.names = 3.0, ["a"]
        close(fast(images()), model(images()))
        close(fast(images(), flag=True), model(images(), flag=True))
        close(fast(images(), True), model(images(), True))
        if which == "keeps":
            close(fast.kept, model.kept)
        for block in (model, fast):
            block.which = "method"
        close(fast(images()), model(images()))


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_other_dtypes_devices_and_tensors_run_the_code(calls):
    model, x = masked(nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.SiLU())), images()
    fast = sparsify.export(model, format="panel")
    with torch.no_grad():
        close(fast(x), model(x))
        assert calls == [(True, False, "silu")]
        with pytest.raises(RuntimeError, match="images of shape"):
            fast(x[:, 1:])
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(x).dtype == model(x).dtype == torch.bfloat16
        close(fast[:2](x), model[:2](x))
        torch.testing.assert_close(copy.deepcopy(fast).double()(x.double()), copy.deepcopy(model).double()(x.double()))
        torch.testing.assert_close(copy.deepcopy(fast).bfloat16()(x.bfloat16()).float(), model(x), rtol=0.05, atol=0.05)
        other = sparsify.export(model, format="csr")
        close(other(x), model(x))
        assert len(calls) == 1
    for of_one in (
        torch.compile(fast, fullgraph=True, backend="aot_eager"),
        torch.jit.trace(fast, (x,)),
        torch.fx.symbolic_trace(fast),
    ):
        with torch.no_grad():
            close(of_one(x), model(x))
    close(torch.export.export(fast, (x,)).module()(x), model(x))
    x.requires_grad_()
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (fast, model)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pool_has_channels_last_only_inside(layout, calls):
    model = masked(nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)))
    fast, x = sparsify.export(model, format="panel"), images(layout)
    with torch.no_grad():
        close(fast(x), model(x))
        assert fast(x).is_contiguous(memory_format=layout)
        assert len(calls) == 2
        for block in (model, fast):
            block[3].return_indices = True
        close(fast(x)[0], model(x)[0])
        assert torch.equal(fast(x)[1], model(x)[1])
    assert len(calls) == 2


def test_signals_are_normalized_too(calls):
    model = masked(nn.Sequential(nn.Conv1d(16, 24, 5, padding=2, stride=2), nn.BatchNorm1d(24), nn.ReLU()))
    fast, x = sparsify.export(model, format="panel"), torch.randn(3, 16, 40)
    with torch.no_grad():
        close(fast(x), model(x))
    assert calls == [(True, False, "relu")]


def test_models_of_torchvision(calls):
    models = pytest.importorskip("torchvision.models", reason="torchvision is missing: pip install torchvision")
    for name, n_layers in (("resnet18", 20), ("regnet_y_400mf", None)):
        torch.manual_seed(0)
        model = masked(models.get_model(name, weights=None, num_classes=5).eval(), 0.8)
        fast, x = sparsify.export(model, format="panel"), torch.randn(1, 3, 64, 64)
        del calls[:]
        with torch.no_grad():
            wanted = model(x)
            torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert len(calls) == n_layers if n_layers else len(calls) > 20


class Remembers(nn.Module):
    """Has no weights, and keeps what it works out from its first input, as torchvision's pooling of regions does."""

    def __init__(self):
        super().__init__()
        self.scale, self.norm = None, nn.Identity()

    def forward(self, x):
        if self.scale is None:
            self.scale = self.norm.seen = x.sum()
        return x / self.scale


def test_reading_the_code_of_a_module_leaves_no_trace_in_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Remembers(), nn.ReLU()).eval()
    masked_model = sparsify.prune(sparsify.convert(model, types=(nn.Conv2d,)), 0.5)
    fast = sparsify.export(masked_model, format="panel")
    assert fast[1].scale is None
    assert not hasattr(fast[1].norm, "seen")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fast(x), masked_model(x))

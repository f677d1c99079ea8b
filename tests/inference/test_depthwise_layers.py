"""Depthwise convolutions of exported models: right outputs, torch's own code where in doubt, and torch's class back."""

import copy
import io

import pytest
import torch
from tested_kernels import needs_native
from torch import nn

import sparsify
from sparsify.layers import DepthwiseConv2d

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Separable(nn.Module):
    """A depthwise convolution and one of 1x1, each with a norm and an activation, around a shortcut."""

    def __init__(self, activation=nn.Hardswish, **settings):
        super().__init__()
        settings = {"kernel_size": 3, "padding": 1, **settings}
        self.depthwise, self.norm = nn.Conv2d(24, 24, groups=24, bias=False, **settings), nn.BatchNorm2d(24)
        self.act = activation(inplace=True)
        self.pointwise, self.norm2 = nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24)

    def forward(self, x):
        return x + self.norm2(self.pointwise(self.act(self.norm(self.depthwise(x)))))


def exported(model, **options):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    pointwise = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    masked = sparsify.prune(sparsify.convert(model.eval(), types=(nn.Conv2d,), include=pointwise), 0.5)
    return sparsify.export(masked, format="panel", **options), masked


def images(layout=torch.contiguous_format):
    return torch.randn(2, 24, 12, 13, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)


def close(found, wanted):
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.fixture
def calls(monkeypatch):
    """Return what the kernel computed together, as a list that grows."""
    made, run = [], DepthwiseConv2d.convolve_fused

    def spy(layer, x, norm, residual, activation, **layout):
        y = run(layer, x, norm, residual, activation, **layout)
        if y is not None:
            made.append((norm is not None, activation))
        return y

    monkeypatch.setattr(DepthwiseConv2d, "convolve_fused", spy)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(("activation", "name"), [(nn.Hardswish, "hardswish"), (nn.ReLU6, "relu6"), (nn.SiLU, "silu")])
def test_one_call_with_its_norm_and_activation(layout, mode, activation, name, calls):
    fast, masked = exported(Separable(activation))
    plain, _ = exported(copy.deepcopy(masked), fuse=False)
    assert type(fast.depthwise) is DepthwiseConv2d
    assert type(plain.depthwise) is nn.Conv2d
    assert fast.depthwise.followed_by == f"batch_norm, {name}"
    with mode():
        wanted = masked(images(layout))
        close(fast(images(layout)), wanted)
        assert calls == ([] if mode is torch.enable_grad else [(True, name)])
        close(plain(images(layout)), wanted)
        assert fast(images(layout)).is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2},
        {"kernel_size": (1, 5), "padding": (0, 2)},
        {"dilation": 2, "padding": "same"},
        {"kernel_size": 4, "padding": 0},
        {"padding_mode": "reflect"},
        {"kernel_size": 2, "padding": "same"},
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_every_setting_is_torchs_result(settings):
    model = nn.Sequential(
        nn.Conv2d(24, 24, groups=24, **{"kernel_size": 3, "padding": 1, **settings}), nn.Conv2d(24, 96, 1)
    )
    fast, masked = exported(model)
    takes = "padding_mode" not in settings and settings.get("kernel_size") != 2
    assert isinstance(fast[0], DepthwiseConv2d) is takes, "padding by values, or uneven, is torch's"
    with torch.inference_mode():
        close(fast(images()), masked(images()))
        close(fast(images()[0]), masked(images()[0]))


def test_other_calls_are_torchs(calls):
    fast, masked = exported(Separable())
    layer = fast.depthwise
    x = images().requires_grad_()
    layer(x).sum().backward()
    wanted = torch.autograd.grad(masked.depthwise(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)
    with torch.no_grad():
        assert torch.func.vmap(layer)(images()[None]).shape == (1, 2, 24, 12, 13)
        torch.testing.assert_close(
            copy.deepcopy(layer).double()(images().double()), masked.depthwise.double()(images().double())
        )
        masked.float()
        assert calls == []
        with pytest.raises(RuntimeError, match="channels"):
            layer(images()[:, :20])
        handle = layer.register_forward_hook(lambda module, args, y: y * 0)
        fast(images())
        assert (True, "hardswish") not in calls, "a watched layer is called by itself"
        handle.remove()
        close(torch.compile(fast, backend="eager")(images()), masked(images()))
    bf16 = copy.deepcopy(layer).bfloat16()
    with torch.no_grad():
        assert bf16(images().bfloat16()).dtype == torch.bfloat16
        assert calls[-1] == (False, "none")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Tagged(torch.Tensor):
    """A tensor that is more than its numbers."""


@pytest.mark.filterwarnings("ignore::sparsify.LeftDenseWarning")
def test_large_and_dilated_kernels_over_channels_last_are_torchs(calls):
    for settings in ({"kernel_size": 9, "padding": 4}, {"kernel_size": 3, "dilation": 2, "padding": 2}):
        fast, masked = exported(Separable(**settings))
        for layout in LAYOUTS:
            del calls[:]
            with torch.no_grad():
                close(fast(images(layout)), masked(images(layout)))
            assert len(calls) == (layout is torch.contiguous_format)


def test_a_weight_that_is_computed_or_of_a_class_of_its_own_is_torchs(calls):
    layer = exported(Separable())[0].depthwise
    with torch.no_grad():
        once = layer(images())
        assert len(calls) == 1
        nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
        close(layer(images()), 2 * once)
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        layer.weight = nn.Parameter(layer.weight.as_subclass(Tagged))
        close(layer(images()).as_subclass(torch.Tensor), 2 * once)
    assert len(calls) == 1


def test_graphs_copies_files_and_the_way_back(tmp_path):
    fast, masked = exported(Separable())
    fresh = Separable().eval()
    with torch.inference_mode():
        wanted = fast(images())
        graph = torch.fx.symbolic_trace(fast)
        assert next(node.target for node in graph.graph.nodes if node.op == "call_module") == "depthwise"
        assert torch.equal(copy.deepcopy(fast)(images()), wanted)
        memory = io.BytesIO()
        torch.save(fast, memory)
        memory.seek(0)
        assert torch.equal(torch.load(memory, weights_only=False)(images()), wanted)
        assert list(fast.state_dict()) == list(exported(copy.deepcopy(masked), fuse=False)[0].state_dict())
        sparsify.save(fast, tmp_path / "model.safetensors")
        loaded = sparsify.load(tmp_path / "model.safetensors", fresh)
        assert type(loaded.depthwise) is DepthwiseConv2d
        assert torch.equal(loaded(images()), wanted)
        program = torch.export.export(fast, (images(),)).module()
        close(program(images()), wanted)
    dense = sparsify.to_dense(fast)
    assert type(dense.depthwise) is nn.Conv2d
    assert "followed_by" not in dense.depthwise.__dict__
    with torch.no_grad():
        close(dense(images()), wanted)


def test_the_reference_leaves_torchs_convolution():
    _, masked = exported(Separable())
    fast = sparsify.export(masked, format="csr")
    assert type(fast.depthwise) is nn.Conv2d
    with torch.no_grad():
        assert torch.equal(fast(images()), masked(images()))


def test_a_pruned_depthwise_convolution_keeps_its_zeros():
    masked = sparsify.prune(
        sparsify.convert(
            nn.Sequential(nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 96, 1)).eval(), types=(nn.Conv2d,)
        ),
        0.5,
    )
    fast = sparsify.export(masked, format="panel")
    assert type(fast[0]) is DepthwiseConv2d
    assert int((fast[0].weight == 0).sum()) == fast[0].weight.numel() // 2
    with torch.no_grad():
        close(fast(images()), masked(images()))

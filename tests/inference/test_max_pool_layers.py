"""Max pools of exported models: torch's results bit for bit, in the layout of the input, and torch's class back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tested_kernels import needs_native
from torch import nn

import sparsify
from sparsify.layers import MaxPool2d

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

SETTINGS = (
    {"kernel_size": 5, "stride": 1, "padding": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": True},
)


class Pooled(nn.Module):
    """A pool of what a convolution gives, itself and its pool side by side."""

    def __init__(self, channels=24, **settings):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.pool = nn.MaxPool2d(**({"kernel_size": 5, "stride": 1, "padding": 2} | settings))

    def forward(self, x):
        y = self.first(x)
        return y, self.pool(y)


def exported(model, format="panel"):
    torch.manual_seed(0)
    masked = sparsify.prune(sparsify.convert(model.eval(), types=(nn.Conv2d,)), 0.5)
    return sparsify.export(masked, format=format), masked


def images(channels=24, layout=torch.contiguous_format):
    x = torch.randn(2, channels, 11, 13, generator=torch.Generator().manual_seed(1))
    x[0, 1, 3, 4], x[1, 0, 0, 0], x[1, 2] = float("nan"), float("inf"), -float("inf")
    return x.to(memory_format=layout)


@pytest.fixture
def layouts(monkeypatch):
    """Return the layouts of the images that torch's pool gets, channels last or not, as a list that grows."""
    seen, pool = [], F.max_pool2d

    def spy(x, *args, **options):
        if type(x) is torch.Tensor:
            seen.append(not x.is_contiguous())
        return pool(x, *args, **options)

    monkeypatch.setattr(F, "max_pool2d", spy)
    return seen


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_setting_is_torchs_result_in_its_layout(settings, layout):
    pool, plain = exported(Pooled(**settings))[0].pool, nn.MaxPool2d(**settings)
    assert type(pool) is MaxPool2d
    with torch.inference_mode():
        found, wanted = pool(images(layout=layout)), plain(images(layout=layout))
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert torch.equal(found.isnan(), wanted.isnan())
        assert found.stride() == wanted.stride()
        assert torch.equal(pool(images()[0]).nan_to_num(), plain(images()[0]).nan_to_num())
        strided = images()[:, :, ::2, 1:]
        assert torch.equal(pool(strided).nan_to_num(), plain(strided).nan_to_num())


def test_images_of_enough_channels_and_values_are_pooled_with_channels_last(layouts):
    pool = exported(Pooled())[0].pool
    with torch.no_grad():
        pool(images())
        pool(images(channels=3))
        pool(images()[:1, :, :5].contiguous())
        pool(images(layout=torch.channels_last))
    assert layouts == [True, False, False, True]


def test_other_calls_are_torchs(layouts):
    pool = exported(Pooled())[0].pool
    x = torch.randn(1, 24, 11, 11, requires_grad=True)
    pool(x).sum().backward()
    wanted = torch.autograd.grad(nn.MaxPool2d(5, 1, 2)(x).sum(), x)[0]
    assert torch.equal(x.grad, wanted)
    with torch.no_grad():
        assert torch.func.vmap(pool)(images()[None]).shape == (1, 2, 24, 11, 13)
        assert torch.equal(torch.compile(pool, backend="eager")(x), pool(x))
        assert torch.equal(torch.export.export(pool, (x,)).module()(x), pool(x))
        graph = torch.fx.symbolic_trace(nn.Sequential(pool))
        del layouts[:]
        assert torch.equal(graph(x), pool(x))
    assert layouts == [False, True], "the graph has torch's function"


def test_a_pool_with_indices_or_a_forward_of_its_own_stays():
    model = Pooled(return_indices=True)
    assert type(exported(model)[0].pool) is nn.MaxPool2d
    model = Pooled()
    model.pool.forward = lambda y: y
    fast = exported(model)[0]
    assert type(fast.pool) is nn.MaxPool2d
    with torch.no_grad():
        first, pooled = fast(torch.randn(1, 3, 5, 5))
    assert torch.equal(first, pooled)


def test_copies_files_and_the_way_back(tmp_path):
    fast, masked = exported(Pooled())
    x = torch.randn(2, 3, 9, 9)
    sparsify.save(fast, tmp_path / "model.safetensors")
    loaded = sparsify.load(tmp_path / "model.safetensors", Pooled().eval())
    assert type(loaded.pool) is MaxPool2d
    with torch.inference_mode():
        wanted = fast(x)[1]
        assert torch.equal(copy.deepcopy(fast)(x)[1], wanted)
        assert torch.equal(loaded(x)[1], wanted)
    assert type(sparsify.to_dense(fast).pool) is nn.MaxPool2d
    assert type(sparsify.export(masked, format="csr").pool) is nn.MaxPool2d, "the reference is torch's"

"""Layers call kernels without torch's dispatcher where nobody could tell, and through it where somebody watches."""

import pytest
import torch
from tested_kernels import needs_native
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.kernels import linear, pack, torch_ops
from sparsify.kernels.csr import dense_to_csr

pytestmark = needs_native

OUT, IN = 12, 20
KINDS = {"csr": "linear_csr", "panel": "linear_packed", "quads": "linear_int8"}


def parts_of(form: str) -> tuple[Tensor, ...]:
    weight = torch.arange(OUT * IN).view(OUT, IN) % 7 - 3
    if form == "quads":
        return pack(form, dense_to_csr(weight.to(torch.int8), weight > 0), (OUT, IN), torch.full((OUT,), 0.1))
    return pack(form, dense_to_csr(weight.float(), weight > 0), (OUT, IN))


@pytest.fixture(params=KINDS)
def call(request):
    """Return a call of a layer of a form on x, and the name of its operator."""
    parts, bias = parts_of(request.param), torch.nn.Parameter(torch.ones(OUT), requires_grad=False)
    return lambda x: linear(x, parts, request.param, (OUT, IN), bias), KINDS[request.param]


@pytest.fixture
def dispatched(monkeypatch):
    """Return the names of operators called through torch, as a list that grows."""
    names: list[str] = []

    class Noting:
        def __getattr__(self, name):
            names.append(name)
            return getattr(torch.ops.sparsify, name)

    monkeypatch.setattr(torch_ops, "_eager", Noting())
    return names


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_goes_straight_to_the_kernel_and_gives_the_same_bits(mode, call, dispatched):
    run, name = call
    x = torch.randn(3, IN)
    wanted = run(x)
    assert dispatched == [name]
    with mode():
        found = run(x)
    assert torch.equal(found, wanted)
    assert not found.requires_grad
    assert found.is_inference() == (mode is torch.inference_mode)
    assert dispatched == [name]


class Subclass(Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watcher", [Functions, Dispatches, torch.profiler.profile])
def test_whoever_watches_sees_the_operator(watcher, call, dispatched):
    run, name = call
    with torch.inference_mode(), watcher():
        run(torch.randn(3, IN))
    assert dispatched == [name]


def test_a_profile_has_the_operator_by_name(call):
    run, name = call
    with torch.inference_mode(), torch.profiler.profile() as profile:
        run(torch.randn(3, IN))
    assert f"sparsify::{name}" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore:.*jit.trace:FutureWarning")
def test_a_trace_has_the_operator(call, dispatched):
    run, name = call
    with torch.no_grad():
        graph = torch.jit.trace(run, torch.randn(3, IN)).graph
    assert f"sparsify::{name}" in str(graph)
    assert name in dispatched


def test_a_tensor_of_another_class_keeps_its_own_operators(call, dispatched):
    run, name = call
    with torch.inference_mode():
        run(torch.randn(3, IN).as_subclass(Subclass))
    assert dispatched == [name]


def test_wrong_operands_are_refused_as_by_the_operator(call):
    run, _ = call
    x = torch.randn(3, IN + 1)
    messages = []
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), pytest.raises(RuntimeError) as error:
            run(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]

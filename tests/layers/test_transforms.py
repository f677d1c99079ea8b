"""Derivatives of exported layers by torch.func, forwards, and of second order: those of the masked layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd import functional as autograd
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import sparsify
from sparsify.kernels.cpu import library as native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),  # torch's own, in jvp
]

FORMS = ("csr", *(native.FORMS[:2] if native.available() else ()))


def linears() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 3)
    return sparsify.prune(sparsify.convert(nn.Sequential(*layers).eval()), 0.5), torch.randn(2, 8)


def convolutions() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 3, 1), nn.SiLU(), nn.Conv2d(3, 2, 1)
    model = sparsify.convert(nn.Sequential(*layers).eval(), types=nn.Conv2d)
    return sparsify.prune(model, 0.5), torch.randn(2, 4, 2, 3)


def total(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


def tangent(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.flip(0)))).tangent


def tangent_of_gradient(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), x.flip(0))
        return forward_ad.unpack_dual(torch.autograd.grad(total(model)(dual), dual, create_graph=True)[0]).tangent


def gradients_at_once(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = model(x)
    return torch.autograd.grad(y, x, torch.stack([y.detach(), torch.ones_like(y)]), is_grads_batched=True)[0]


def gradient_penalty(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(model)(x), x, create_graph=True)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return list(torch.autograd.grad(first.square().sum(), [x, *biases[:-1]]))


def gradients_by_sample(model: nn.Module, x: Tensor) -> Any:
    biases = {name: p.detach() for name, p in model.named_parameters() if name.endswith("bias")}
    by_bias = grad(lambda biases, x: functional_call(model, biases, (x[None],)).square().sum())
    return vmap(by_bias, in_dims=(None, 0))(biases, x)


USES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "jvp": lambda model, x: jvp(model, (x,), (x.flip(0),)),
    "jacfwd": lambda model, x: jacfwd(model)(x),
    "jacrev": lambda model, x: jacrev(model)(x),
    "hessian": lambda model, x: hessian(total(model))(x),
    "grad": lambda model, x: grad(total(model))(x),
    "vjp": lambda model, x: vjp(model, x)[1](model(x).detach()),
    "vmap": lambda model, x: vmap(model)(x[:, None]),
    "by sample": gradients_by_sample,
    "dual numbers": tangent,
    "dual numbers without grad": torch.no_grad()(tangent),
    "dual numbers in inference mode": lambda model, x: tangent(copy.deepcopy(model).requires_grad_(False), x),
    "forward over reverse": tangent_of_gradient,
    "batched gradients": gradients_at_once,
    "jacobian at once": lambda model, x: autograd.jacobian(model, x, vectorize=True),
    "double backward": lambda model, x: autograd.hvp(total(model), x, x.flip(0)),
    "gradient penalty": gradient_penalty,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", [linears, convolutions])
@pytest.mark.parametrize("form", FORMS)
def test_derivatives_are_those_of_the_masked_model(form: str, make: Callable[[], Any], use: str) -> None:
    model, x = make()
    found, wanted = (USES[use](one, x) for one in (sparsify.export(model, format=form), model))
    assert sum(bool(leaf.any()) for leaf in tree_leaves(wanted)) > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_through_the_weight_of_an_exported_layer(form: str) -> None:
    model, x = linears()
    layer, masked = sparsify.export(model, format=form)[0], model[0]
    found = jvp(lambda x: F.linear(x, layer.weight, layer.bias), (x,), (x.flip(0),))
    torch.testing.assert_close(found, jvp(masked, (x,), (x.flip(0),)))


@pytest.mark.parametrize("form", FORMS)
def test_an_operator_that_would_lose_a_tangent_refuses(form: str) -> None:
    """As in a graph that torch.export made, where no layer is left."""
    model, x = linears()
    layer = sparsify.export(model, format=form)[0]
    ops: Any = torch.ops.sparsify
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        number = () if form == "csr" else (native.FORMS.index(form),)
        operator = ops.linear_csr if form == "csr" else ops.linear_packed
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            operator(dual, *layer.tensors, *number, layer.bias, *layer.shape, 0)

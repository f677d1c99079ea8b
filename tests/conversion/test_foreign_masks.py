"""Models pruned by torch's own tools convert, and keep their masks."""

import copy
import warnings

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from cases import weight
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsify import LeftDenseWarning, SparseLinear, convert, export, prune, to_dense
from sparsify.conversion.foreign_masks import parameter_and_mask

X = weight((3, 8), seed=7)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def with_torch_prune(net: nn.Sequential) -> list[Tensor]:
    torch_prune.l1_unstructured(net[0], "weight", amount=0.5)
    torch_prune.random_structured(net[2], "weight", amount=1, dim=0)
    torch_prune.l1_unstructured(net[2], "weight", amount=0.5)  # twice: a PruningContainer
    return [net[0].weight_mask.bool(), net[2].weight_mask.bool()]


def with_ao(net: nn.Sequential) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.pruning import WeightNormSparsifier

        sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
        sparsifier.prepare(net, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
        sparsifier.step()
    return [net[i].parametrizations["weight"][0].mask.bool() for i in (0, 2)]


@pytest.mark.parametrize("tool", [with_torch_prune, with_ao])
@pytest.mark.parametrize("forward_first", [True, False])
def test_a_pruned_model_keeps_masks_and_outputs(tool, forward_first: bool) -> None:  # type: ignore[no-untyped-def]
    net = model()
    masks = tool(net)
    assert all(0 < int(mask.sum()) < mask.numel() for mask in masks)
    expected = net(X) if forward_first else copy_output(net)
    parameters = {id(p) for p in net.parameters()}
    convert(net)
    layers = [net[0], net[2]]
    for layer, mask in zip(layers, masks, strict=True):
        assert type(layer) is SparseLinear
        assert torch.equal(layer.mask, mask)
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight[~mask].eq(0).all()
    assert torch.equal(net(X), expected)
    assert {id(p) for p in net.parameters()} == parameters
    assert list(net.state_dict()) == [f"{i}.{key}" for i in (0, 2) for key in ("weight", "bias", "mask")]


def copy_output(net: nn.Module) -> Tensor:
    """Run the model without leaving a trace of it in the model."""
    before = {name: module.__dict__.get("weight") for name, module in net.named_modules()}
    out = net(X)
    for name, module in net.named_modules():
        if before[name] is not None:
            module.__dict__["weight"] = before[name]
    return out


@pytest.mark.parametrize("tool", [with_torch_prune, with_ao])
def test_a_pruned_model_goes_all_the_way(tool) -> None:  # type: ignore[no-untyped-def]
    net = model()
    mask = tool(net)[0]
    convert(net)
    before = net[0].weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, before)  # it trains: the Parameter is what the layer uses
    assert torch.equal(net[0].weight == 0, ~mask)
    prune(net, 0.75)
    assert net[0].sparsity == 0.75
    assert not bool((net[0].mask & ~mask).any())
    expected = net(X)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(X), expected)
    torch.testing.assert_close(export(net, format="csr")(X), expected)
    to_dense(net)
    assert [type(layer) for layer in net] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(net(X), expected)
    assert list(net.state_dict()) == list(model().state_dict())


def test_other_hooks_of_a_pruned_layer_stay() -> None:
    net, calls = model(), []
    net[0].register_forward_pre_hook(lambda *_: calls.append("mine"))
    with_torch_prune(net)
    convert(net)
    net(X)
    assert calls == ["mine"]
    assert len(net[0]._forward_pre_hooks) == 1


def test_a_permanently_pruned_layer_is_plain() -> None:
    net = model()
    with_torch_prune(net)
    for i in (0, 2):
        torch_prune.remove(net[i], "weight")
    convert(net)
    assert net[0].sparsity == 0  # zeros are no mask unless asked for
    assert int((net[0].weight == 0).sum()) == 48


def test_a_mask_that_is_none_stays_dense_with_its_reason() -> None:
    net = model()
    torch_prune.custom_from_mask(net[0], "weight", torch.full((12, 8), 0.5))
    with pytest.warns(LeftDenseWarning, match=r"0 \(its mask holds other values than 0 and 1"):
        convert(net)
    assert type(net[0]) is nn.Linear


def test_a_second_parametrization_stays_dense() -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    net = model()
    with_ao(net)
    parametrize.register_parametrization(net[0], "weight", Twice())
    with pytest.warns(LeftDenseWarning, match=r"0 \(it is parametrized"):
        convert(net)
    assert parametrize.is_parametrized(net[0])


def test_masked_parts_of_a_plain_linear() -> None:
    linear = nn.Linear(3, 2)
    parts = parameter_and_mask(linear)
    assert parts.weight is linear.weight
    assert parts.mask is None

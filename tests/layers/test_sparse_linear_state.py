"""SparseLinear as an nn.Linear: its state_dict, copies, moves and casts, and its weights as COO and CSR."""

import copy
import io
import pickle

import pytest
import torch
from cases import DTYPES, SHAPES, masks, weight
from masked_linears import inputs, layer_with
from torch import nn

from sparsify import SparseLinear

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_coo_and_csr_hold_the_kept_weights(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for mask in masks(shape).values():
        layer = layer_with(mask, dtype)
        coo, csr = layer.to_coo(), layer.to_csr()
        assert (coo.layout, csr.layout) == (torch.sparse_coo, torch.sparse_csr)
        assert coo.is_coalesced()
        for sparse in (coo, csr):
            assert sparse.dtype == dtype
            assert not sparse.requires_grad
            assert sparse.values().numel() == int(mask.sum())
            assert torch.equal(sparse.to_dense(), weight(shape, dtype) * mask)
    coo.values().fill_(7.0)
    assert not layer.weight.eq(7.0).any()  # a copy


def test_a_kept_zero_is_kept_in_coo_and_csr() -> None:
    layer = layer_with(torch.tensor([[True, False]]))
    with torch.no_grad():
        layer.weight.zero_()
    assert layer.to_coo().values().tolist() == [0.0]
    assert layer.to_csr().values().tolist() == [0.0]


def test_state_dict_round_trip() -> None:
    layer = layer_with(masks((12, 8))["half"])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = SparseLinear(8, 12, 0.9)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert list(layer.state_dict()) == ["weight", "bias", "mask"]
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state_dict_loads_under_the_present_mask(assign: bool) -> None:
    dense = nn.Linear(8, 12)
    model = nn.Sequential(SparseLinear(8, 12, 0.5, seed=0))
    before = model[0].mask.clone()
    state = {f"0.{key}": value.clone() for key, value in dense.state_dict().items()}
    assert model.load_state_dict(state, assign=assign) == ([], [])
    assert torch.equal(model[0].mask, before)
    assert torch.equal(model[0].weight, dense.weight * before)
    assert torch.equal(model[0].bias, dense.bias)


def test_a_state_dict_without_the_weight_is_incomplete() -> None:
    layer = SparseLinear(8, 12, 0.5)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight", "mask"'):
        layer.load_state_dict({"bias": torch.zeros(12)})


def test_a_dense_state_dict_fills_a_layer_on_the_meta_device() -> None:
    dense = nn.Linear(8, 12)
    layer = SparseLinear.from_linear(nn.Linear(8, 12, device="meta"))
    assert layer.mask.is_meta
    layer.load_state_dict(dense.state_dict(), assign=True)
    assert layer.mask.device == dense.weight.device
    assert layer.mask.all()
    assert torch.equal(layer(torch.ones(1, 8)), dense(torch.ones(1, 8)))


def test_it_loads_into_a_dense_layer() -> None:
    layer = layer_with(masks((12, 8))["half"])
    dense = nn.Linear(8, 12)
    assert dense.load_state_dict(layer.state_dict(), strict=False).unexpected_keys == ["mask"]
    assert torch.equal(dense(inputs(layer)), layer(inputs(layer)))


def test_from_linear_and_to_linear_share_the_parameters() -> None:
    linear = nn.Linear(8, 12).eval()
    mask = masks((12, 8))["half"]
    layer = SparseLinear.from_linear(linear, mask)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert linear.weight[~mask].eq(0).all()
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert back.weight is linear.weight
    assert back.bias is linear.bias
    assert not back.training
    assert torch.equal(back(inputs(layer)), layer(inputs(layer)))
    assert SparseLinear.from_linear(nn.Linear(3, 2, bias=False)).bias is None


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_independent(how: str) -> None:
    layer = layer_with(masks((12, 8))["half"])
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(inputs(layer)), layer(inputs(layer)))
    before = layer.mask.clone()
    twin.sparse_update(1.0)
    assert torch.equal(layer.mask, before)
    assert layer.weight[before].ne(0).all()


def test_moves_and_casts_leave_the_mask_a_mask() -> None:
    layer = layer_with(masks((12, 8))["half"])
    for moved in (layer.half(), layer.to(torch.float64), layer.bfloat16()):
        assert moved.mask.dtype == torch.bool
        assert moved(inputs(moved)).dtype == moved.weight.dtype
    assert layer.to("meta").mask.is_meta
    assert "in_features=8, out_features=12" in repr(layer)


def test_reset_parameters_keeps_the_mask() -> None:
    layer = layer_with(masks((12, 8))["half"])
    before, mask = layer.weight.detach().clone(), layer.mask.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.mask, mask)
    assert layer.weight[~mask].eq(0).all()


def test_the_mask_is_bool_and_full_after_it_got_its_memory() -> None:
    layer = SparseLinear(4, 3, 0.0, device="meta").to_empty(device="cpu")
    assert layer.mask.dtype == torch.bool
    assert layer.mask.all()
    half = SparseLinear(4, 3, 0.5, seed=0)
    mask = half.mask.clone()
    assert torch.equal(half.type(torch.float64).mask, mask)
    state = half.state_dict()
    state["mask"] = state["mask"].double()
    with pytest.raises(RuntimeError, match="mask must be bool"):
        half.load_state_dict(state)


def test_a_layer_made_from_a_masked_one_keeps_its_mask() -> None:
    layer = SparseLinear(4, 3, 0.5, seed=0)
    assert torch.equal(SparseLinear.from_linear(layer).mask, layer.mask)

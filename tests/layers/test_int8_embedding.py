"""Embeddings with int8 rows: look-ups, copies, dtypes, compilers, and the way back."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify import to_dense
from sparsify.layers import Int8Embedding

IDS = torch.tensor([[0, 6, 2], [5, 5, 1]])


def dense() -> nn.Embedding:
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 4, padding_idx=2)
    with torch.no_grad():
        embedding.weight[5] = 0
    return embedding


def rounded(weight: Tensor) -> Tensor:
    largest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale).round() * scale


def test_rows_are_looked_up_rounded() -> None:
    embedding = dense()
    layer = Int8Embedding.from_embedding(embedding)
    wanted = rounded(embedding.weight.detach())
    assert torch.equal(layer(IDS), wanted[IDS])
    assert torch.equal(layer.weight, wanted)
    assert layer.values.dtype == torch.int8
    assert torch.equal(layer(IDS.to(torch.int32)), wanted[IDS])
    assert layer(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 4)
    assert repr(layer) == "Int8Embedding(7, 4, padding_idx=2, values=int8)"
    with pytest.raises(IndexError):
        layer(torch.tensor([7]))


def test_back_to_an_embedding() -> None:
    model = nn.Sequential(Int8Embedding.from_embedding(dense()))
    wanted = model[0].weight
    back = to_dense(model)[0]
    assert type(back) is nn.Embedding
    assert (back.num_embeddings, back.embedding_dim, back.padding_idx) == (7, 4, 2)
    assert torch.equal(back.weight, wanted)
    assert back.weight.requires_grad
    assert "own_dtype" not in vars(back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(dtype: torch.dtype) -> None:
    layer = Int8Embedding.from_embedding(dense()).to(dtype)
    assert (layer.values.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    assert layer(IDS).dtype == layer.weight.dtype == dtype
    assert torch.equal(layer(IDS), rounded(dense().weight.detach()).to(dtype)[IDS])
    assert to_dense(nn.Sequential(layer))[0].weight.dtype == dtype
    assert Int8Embedding.from_embedding(dense().to(dtype))(IDS).dtype == dtype


def through_state_dict(layer: nn.Module) -> nn.Module:
    fresh = Int8Embedding.from_embedding(nn.Embedding(7, 4))
    fresh.load_state_dict(layer.state_dict())
    return fresh


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "state_dict": through_state_dict,
    "dtypes": lambda layer: copy.deepcopy(layer).half().double().float(),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_the_same_rows(way: str) -> None:
    layer = Int8Embedding.from_embedding(dense())
    twin = COPIES[way](layer)
    assert torch.equal(twin(IDS), layer(IDS))
    twin.values.zero_()
    assert bool(layer(IDS).any())


def test_a_wrong_state_is_refused() -> None:
    layer = Int8Embedding.from_embedding(dense())
    state = layer.state_dict()
    for scale in (torch.zeros(7), torch.full((7,), torch.nan), torch.ones(6)):
        with pytest.raises(RuntimeError, match="scales must be"):
            layer.load_state_dict({**state, "weight_scale": scale})
    with pytest.raises(RuntimeError, match="belongs to int8"):
        layer.load_state_dict({**state, "values": state["values"].float()})
    assert torch.equal(layer.values, state["values"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compile_and_torch_export() -> None:
    torch.compiler.reset()
    layer = Int8Embedding.from_embedding(dense())
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(IDS), layer(IDS))
    assert torch.equal(torch.export.export(layer, (IDS,)).module()(IDS), layer(IDS))
    with pytest.raises(RuntimeError, match="cannot be scripted"):
        torch.jit.script(layer)

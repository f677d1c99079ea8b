"""Blocks tuned one at a time come nearer to the dense model, and nothing else of the model changes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import Reconstruction


class Block(nn.Module):
    """A residual block that returns a tuple, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.down(torch.relu(self.up(self.norm(x)))), None


class Blocks(nn.Module):
    """An embedding, blocks in a row, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


DATA = [torch.randint(20, (8, 5), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def dense(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return sparsify.convert(Blocks().to(dtype).train(), include=["blocks.*", "head"])


def pruned(method: str = "sparsegpt", *, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    options = {"data": DATA, "pattern": "2:4", **options}
    return sparsify.prune(dense(dtype), method=method, **options)


def hidden(model: nn.Module) -> Tensor:
    """Return the inputs of the head."""
    model = copy.deepcopy(model).eval()
    model.head = nn.Identity()
    with torch.no_grad():
        return torch.cat([model(ids) for ids in DATA]).double()


def distance(model: nn.Module) -> float:
    return float((hidden(model) - hidden(dense())).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{"method": "magnitude"}, {"correct": True}])
def test_it_comes_nearer_and_the_masks_hold(options: dict[str, Any], dtype: torch.dtype) -> None:
    before, model = (pruned(dtype=dtype, reconstruct=n, **options) for n in (None, 20))
    assert distance(model) < (0.7 if dtype != torch.bfloat16 else 0.9) * distance(before)
    for block in model.blocks:
        for layer in (block.up, block.down):
            assert layer.weight.dtype == dtype
            assert bool((layer.mask.reshape(-1, 4).sum(1) == 2).all())
            assert bool((layer.weight[~layer.mask] == 0).all())
            assert layer.pruning_result.time_s > 0


@pytest.mark.filterwarnings("ignore::sparsify.SlowBfloat16Warning")
def test_bfloat16_is_for_the_computation_only() -> None:
    before, one, other = (pruned(reconstruct=how) for how in (None, Reconstruction(20, bfloat16=True), 20))
    assert distance(one) < 0.8 * distance(before)
    assert not torch.equal(one.blocks[0].up.weight, other.blocks[0].up.weight)
    weight = one.blocks[0].up.weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())
    with pytest.raises(ValueError, match=r"blocks\.0\.up: bfloat16 is for layers in float32, got torch.bfloat16"):
        pruned(dtype=torch.bfloat16, reconstruct=Reconstruction(1, bfloat16=True))


def test_only_kept_weights_and_biases_of_blocks_move() -> None:
    model = dense()
    model.blocks[1].up.bias.requires_grad_(False)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    sparsify.prune(model, pattern="2:4", method="magnitude", data=DATA, reconstruct=1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p[p != 0], values[name][p != 0])}
    assert moved == {f"blocks.{i}.{name}" for i in range(3) for name in ("up.weight", "up.bias", "down.weight")}
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["blocks.1.up.bias"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_same_twice_whatever_stays_in_memory(one_thread: None) -> None:
    one, other, third = (
        pruned(reconstruct=Reconstruction(2, seed=seed), cache_bytes=n) for seed, n in ((1, None), (1, 0), (2, None))
    )
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.blocks[2].up.weight, third.blocks[2].up.weight)


def test_padding_does_not_count(one_thread: None) -> None:
    """The token of the padding changes nothing: no block mixes positions."""
    mask = torch.ones(8, 5, dtype=torch.long)
    mask[:, 3:] = 0
    batches = [{"ids": DATA[0].masked_fill(mask == 0, token), "attention_mask": mask} for token in (1, 2)]
    one, other = (pruned(reconstruct=2, data=[batch]) for batch in batches)
    assert torch.equal(one.blocks[2].up.weight, other.blocks[2].up.weight)


def test_what_cannot_be_is_an_error_and_changes_nothing() -> None:
    for epochs in (0, -1):
        with pytest.raises(ValueError, match=f"epochs and lr must be positive and finite, got {epochs}"):
            pruned(reconstruct=epochs)
    with pytest.raises(ValueError, match="reconstruct=2 has no effect without data"):
        sparsify.prune(dense(), 0.5, reconstruct=2)
    with pytest.raises(ValueError, match="no run of this model shows one"):
        sparsify.prune(sparsify.convert(nn.Linear(8, 8)), 0.5, method="wanda", data=[torch.ones(2, 8)], reconstruct=1)
    model = dense()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^blocks\.0: the loss of its reconstruction became (nan|inf) in step"):
        sparsify.prune(model, 0.5, method="wanda", data=DATA, reconstruct=Reconstruction(9, lr=1e30))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())

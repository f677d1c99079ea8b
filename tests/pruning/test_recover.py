"""recover brings a pruned model nearer to the dense one, and touches nothing that it should not."""

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.calibration.activation_store import MemoryBudget
from sparsify.conversion.convert import sparse_layers
from sparsify.pruning.recover import recover


class Block(nn.Module):
    """A residual block that returns a tuple, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.down(torch.relu(self.up(self.norm(x)))), None


class Blocks(nn.Module):
    """An embedding, blocks in a row, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.drop(x))


DATA = [torch.randint(20, (8, 5), generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A pruned model, training, and its dense teacher."""
    torch.manual_seed(0)
    model = sparsify.convert(Blocks().train(), include="blocks.*")
    teacher = copy.deepcopy(model).eval()
    return sparsify.prune(model, 0.7), teacher


def distance(model: nn.Module, teacher: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        change = sum(float((model(ids) - teacher(ids)).square().sum()) for ids in DATA)
    model.train()
    return change


def test_it_comes_nearer_and_the_masks_hold(pair: tuple[nn.Module, nn.Module]) -> None:
    model, teacher = pair
    before = distance(model, teacher)
    masks = {name: layer.mask.clone() for name, layer in sparse_layers(model).items()}
    recover(model, teacher, DATA, steps=60, lr=1e-2)
    assert distance(model, teacher) < 0.4 * before
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.mask, masks[name])
        assert bool((layer.weight[~layer.mask] == 0).all())


@pytest.mark.filterwarnings("ignore::sparsify.SlowBfloat16Warning")
def test_bfloat16_is_for_the_computation_only(pair: tuple[nn.Module, nn.Module]) -> None:
    model, teacher = pair
    before = distance(model, teacher)
    recover(model, teacher, DATA, steps=60, lr=1e-2, bfloat16=True)
    assert distance(model, teacher) < 0.5 * before
    weight = model.get_parameter("blocks.0.up.weight")
    assert not torch.equal(weight, weight.bfloat16().float())
    with pytest.raises(ValueError, match=r"blocks\.0\.up: bfloat16 is for layers in float32, got torch.float64"):
        recover(model.double(), teacher.double(), DATA, steps=1, bfloat16=True)


def test_only_kept_weights_biases_and_norms_move(pair: tuple[nn.Module, nn.Module]) -> None:
    model, teacher = pair
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    teaching = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    model.get_parameter("blocks.0.up.weight").requires_grad_(False)
    recover(model, teacher, DATA, steps=2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, values[name])}
    assert moved == {name for name in values if name.startswith("blocks.")}
    assert all(torch.equal(p, teaching[name]) for name, p in teacher.named_parameters())
    assert model.training
    assert not teacher.training
    assert all(p.grad is None for p in (*model.parameters(), *teacher.parameters()))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["blocks.0.up.weight"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *teacher.modules()))


def test_the_same_steps_give_the_same_model(pair: tuple[nn.Module, nn.Module], one_thread: None) -> None:
    model, teacher = pair
    other = copy.deepcopy(model)
    for one in (model, other):
        recover(one, teacher, DATA, steps=5, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.fixture
def calls(pair: tuple[nn.Module, nn.Module]) -> list[int]:
    """An entry for each call of the teacher."""
    seen: list[int] = []
    pair[1].register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def test_the_teacher_sees_each_batch_once_within_the_memory_for_its_outputs(
    pair: tuple[nn.Module, nn.Module], calls: list[int], one_thread: None
) -> None:
    """Kept or not, the outputs are the same. A batch has 3 blocks x 8 x 5 x 16 floats."""
    model, teacher = pair
    results = []
    one = 3 * 8 * 5 * 16 * 4
    for n_bytes, n_calls in ((None, 4), (one, 1 + 3 * 3), (one - 1, 4 * 3), (0, 4 * 3)):
        calls.clear()
        results.append(recover(copy.deepcopy(model), teacher, DATA, steps=12, cache_bytes=n_bytes).state_dict())
        assert len(calls) == n_calls
    assert all(torch.equal(tensor, other[name]) for other in results[1:] for name, tensor in results[0].items())


def test_outputs_are_kept_only_where_their_batch_may_come_again(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    take = MemoryBudget.take
    monkeypatch.setattr(MemoryBudget, "take", lambda self, n: bool(kept.append(n)) or take(self, n))
    model, teacher = pair
    recover(model, teacher, DATA, steps=6)
    assert len(kept) == 2  # of six steps four more follow on each of the first two


def test_a_negative_memory_for_outputs_is_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    model, teacher = pair
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="number of bytes, got -1"):
        recover(model, teacher, DATA, steps=1, cache_bytes=-1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_padding_does_not_count(pair: tuple[nn.Module, nn.Module], one_thread: None) -> None:
    """The token of the padding changes nothing: no block mixes positions."""
    model, teacher = pair
    other = copy.deepcopy(model)
    mask = torch.ones(8, 5, dtype=torch.long)
    mask[:, 3:] = 0
    for one, token in ((model, 1), (other, 2)):
        batch = {"ids": DATA[0].masked_fill(mask == 0, token), "attention_mask": mask}
        recover(one, teacher, [batch], steps=3)
    assert torch.equal(model.get_parameter("blocks.2.up.weight"), other.get_parameter("blocks.2.up.weight"))


def test_a_model_without_blocks_is_compared_at_its_output() -> None:
    torch.manual_seed(0)
    model = sparsify.convert(nn.Linear(8, 8))
    teacher = copy.deepcopy(model)
    x = torch.randn(32, 8)
    sparsify.prune(model, 0.5)
    with torch.no_grad():
        before = float((model(x) - teacher(x)).square().sum())
    recover(model, teacher, [x], seconds=0.5, lr=1e-2)
    with torch.no_grad():
        assert float((model(x) - teacher(x)).square().sum()) < before


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was(pair: tuple[nn.Module, nn.Module]) -> None:
    model, teacher = pair
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the loss became (nan|inf) in step \d+; take a lower lr"):
        recover(model, teacher, DATA, steps=50, lr=1e30)
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_is_an_error(pair: tuple[nn.Module, nn.Module]) -> None:
    model, teacher = pair
    with pytest.raises(ValueError, match="needs a budget"):
        recover(model, teacher, DATA)
    with pytest.raises(ValueError, match="must be positive and finite, got 0"):
        recover(model, teacher, DATA, steps=0)
    with pytest.raises(ValueError, match="shares Parameters"):
        recover(model, model, DATA, steps=1)
    with pytest.raises(ValueError, match="data is empty"):
        recover(model, teacher, [], steps=1)


def test_a_teacher_that_overflows_is_named_instead_of_the_learning_rate(pair: tuple[nn.Module, nn.Module]) -> None:
    model, teacher = pair
    with torch.no_grad():
        teacher.get_parameter("blocks.1.down.bias").fill_(torch.inf)
    with pytest.raises(ValueError, match=r"^blocks\.1: the teacher's output on the calibration data holds NaN or Inf"):
        recover(model, teacher, DATA, steps=1)

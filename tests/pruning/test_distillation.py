"""The distance between a model and its teacher: hidden states and logits, without padding."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify
from sparsify.calibration.batches import Batch
from sparsify.calibration.padding import Padding
from sparsify.pruning import distillation
from sparsify.pruning.distillation import Compared, Outputs, check_outputs, distance, divergence


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 2), (33, 1000), (3, 2**19 + 1)])
@pytest.mark.parametrize("at_once", [1, 4000, 1 << 19])
def test_the_divergence_and_its_gradient_are_torchs(
    shape: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's in float64.

    The sum below a logarithm has classes / 8 terms for each lane of a vector, and as many more at the end: its error is
    gamma(classes / 8 + 8) (Higham 2002, section 4.2), that of each logarithm and, relatively, of each share. The
    logarithms are below 32.
    """
    monkeypatch.setattr(distillation, "_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    found, wanted = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    leaf, reference = found.clone().requires_grad_(), found.double().requires_grad_()
    result = divergence(leaf, wanted)
    expected = F.kl_div(
        F.log_softmax(reference, 1), F.log_softmax(wanted.double(), 1), log_target=True, reduction="batchmean"
    )
    (2 * result).backward()
    (2 * expected).backward()
    assert leaf.grad is not None
    assert reference.grad is not None
    bound = (shape[1] / 8 + 8) * torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=4 * 32 * bound)
    largest = float(torch.stack([found, wanted]).double().softmax(-1).max())
    torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=0, atol=2 * 4 * bound * largest / shape[0])


def test_classes_that_are_left_out_by_both_count_nothing() -> None:
    found, wanted = torch.randn(4, 6).requires_grad_(), torch.randn(4, 6)
    with torch.no_grad():
        found[:, 2], wanted[:, 2] = -torch.inf, -torch.inf
    others = [0, 1, 3, 4, 5]
    result = divergence(found, wanted)
    result.backward()
    torch.testing.assert_close(result, divergence(found[:, others], wanted[:, others]))
    assert found.grad is not None
    assert bool((found.grad[:, 2] == 0).all())
    assert bool(found.grad.isfinite().all())


def test_bfloat16_logits_get_a_gradient_in_bfloat16() -> None:
    found = torch.randn(5, 9).bfloat16().requires_grad_()
    divergence(found, torch.randn(5, 9).bfloat16()).backward()
    assert found.grad is not None
    assert found.grad.dtype == torch.bfloat16


class Told(nn.Module):
    """A model with an output of any kind."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.body, self._wrap = nn.Linear(4, 6), wrap

    def forward(self, x: Tensor) -> Any:
        return self._wrap(self.body(x))


OUTPUTS = {
    "mapping": (lambda y: {"loss": torch.zeros(()), "logits": y}, True),
    "field": (lambda y: SimpleNamespace(loss=None, logits=y), True),
    "tokens": (lambda y: {"logits": y[:, None]}, True),
    "pictures": (lambda y: {"logits": y[:, :, None, None]}, False),  # classes are not last
    "numbers": (lambda y: {"logits": y.long()}, False),
    "tensor": (lambda y: y, False),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_are_a_field_of_the_output_unless_told_otherwise(kind: str) -> None:
    wrap, found = OUTPUTS[kind]
    model, batch = Told(wrap), Batch((torch.randn(3, 4),), {}, {}, {})
    assert (Compared(["body"], None).of(model, batch).logits is not None) is found
    assert Compared(["body"], False).of(model, batch).logits is None
    told = Compared(["body"], True).of(Told(lambda y: (y, 3)), batch).logits
    assert told is not None
    assert told.shape == (3, 6)


def test_padding_counts_neither_in_hidden_states_nor_in_logits() -> None:
    kept_tokens = torch.tensor([[True, True, False], [True, False, False]])

    class Known(Padding):
        def counts(self, place: Any, n_before: int, lead: Any, batch: Batch) -> Tensor:
            return kept_tokens

    def outputs() -> Outputs:
        return Outputs({"block": torch.randn(2, 3, 4)}, torch.randn(2, 3, 5))

    found, wanted = outputs(), outputs()
    batch = Batch((), {}, {}, {})
    before = distance(found, wanted, Known({}), batch)
    assert found.logits is not None
    found.logits[~kept_tokens] = 99.0
    found.hidden["block"][~kept_tokens] = 99.0
    assert torch.equal(distance(found, wanted, Known({}), batch), before)
    pooled = Outputs(found.hidden, torch.randn(2, 5))  # one row a sequence
    assert bool(distance(pooled, Outputs(wanted.hidden, torch.randn(2, 5)), Known({}), batch).isfinite())


@pytest.mark.parametrize("has_logits", [False, True])
def test_blocks_count_equally_and_logits_as_much_as_all(has_logits: bool) -> None:
    batch, padding = Batch((), {}, {}, {}), Padding({})
    wanted = {"first": torch.tensor([[0.0], [2.0]]), "last": torch.tensor([[0.0], [4.0]])}
    found = {"first": torch.tensor([[1.0], [2.0]]), "last": torch.tensor([[0.0], [8.0]])}
    of_blocks = [1 / (1 + 1), 16 / (4 + 4)]  # squared distance, relative to the variance
    logits = [torch.tensor([[0.0, 1.0]]).log_softmax(-1), torch.tensor([[1.0, 1.0]]).log_softmax(-1)]
    of_logits = F.kl_div(*logits, log_target=True, reduction="sum") if has_logits else torch.tensor(0.0)
    ours, theirs = logits if has_logits else (None, None)
    right = torch.tensor(sum(of_blocks) / 2) + of_logits
    torch.testing.assert_close(distance(Outputs(found, ours), Outputs(wanted, theirs), padding, batch), right)


def test_logits_of_other_classes_are_refused() -> None:
    hidden, batch = {"block": torch.randn(2, 4)}, Batch((), {}, {}, {})
    with pytest.raises(ValueError, match=r"have the shape \(2, 5\), the teacher's \(2, 6\); give a teacher with"):
        distance(Outputs(hidden, torch.randn(2, 5)), Outputs(hidden, torch.randn(2, 6)), Padding({}), batch)


def test_logits_that_are_not_finite_are_told() -> None:
    fine = {"block": torch.ones(1, 2)}
    check_outputs(Outputs(fine, torch.tensor([[1.0, -torch.inf]])))
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"^the teacher's logits on the calibration data hold NaN or Inf"):
            check_outputs(Outputs(fine, torch.tensor([[1.0, wrong]])))


class Language(nn.Module):
    """Blocks in a row, and logits over more classes than features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return {"logits": self.head(3 * x)}


def test_a_recovery_with_logits_has_the_nearer_logits(one_thread: None) -> None:
    torch.manual_seed(0)
    model = sparsify.convert(Language(), include="blocks.*")
    teacher = copy.deepcopy(model)
    sparsify.prune(model, 0.8)
    data = [torch.randint(50, (8, 16)) for _ in range(4)]

    def apart(one: nn.Module) -> float:
        with torch.no_grad():
            found, wanted = (m(torch.arange(50))["logits"].log_softmax(-1) for m in (one, teacher))
        return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))

    results = {
        logits: apart(sparsify.recover(copy.deepcopy(model), teacher, data, steps=60, lr=5e-3, logits=logits))
        for logits in (None, False)
    }
    assert results[None] < 0.9 * results[False] < 0.9 * apart(model)

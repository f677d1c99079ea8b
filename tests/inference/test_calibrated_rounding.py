"""Rounding by a layer's inputs: the sweep of its definition, and taken only where it is better on rows left out."""

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear
from sparsify.inference import rounding
from sparsify.inference.calibrated_rounding import round_by_inputs
from sparsify.inference.rounding import RoundingJudge
from sparsify.kernels.csr import dense_to_csr
from sparsify.kernels.int8 import quantize
from sparsify.masking.gram import add_damping

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(out: int, n_in: int, n_rows: int, sparsity: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, a mask, and inputs that lean on a few directions, one of them shared by all rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, n_in, generator=generator)
    mask = torch.rand(out, n_in, generator=generator) >= sparsity
    mixed = torch.randn(n_rows, 4, generator=generator) @ torch.randn(4, n_in, generator=generator)
    shared = 5 * torch.randn(n_in, generator=generator)
    return weight * mask, mask, mixed + shared + 0.3 * torch.randn(n_rows, n_in, generator=generator)


def slow(weight: Tensor, mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round by the definition, with the inverse of what is left in each step.

    Returns int8 values with zeros between, what they were before they were rounded, and the order of the columns.
    """
    _, scale = quantize(dense_to_csr(weight, mask), len(weight))
    gram = (rows.T @ rows).double()
    order = gram.diagonal().argsort(descending=True)
    hessian, left = add_damping(gram), order.tolist()
    present, values = (weight / scale[:, None]).double(), torch.zeros_like(weight, dtype=torch.int8)
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        j = left.pop(0)
        values[:, j] = (present[:, j].round().clamp(-127, 127) * mask[:, j]).to(torch.int8)
        error = (present[:, j] - values[:, j]) / inverse[0, 0]
        present[:, left] -= error[:, None] * inverse[0, 1:]
    return values, present, order


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (9, 64), (16, 131), (3, 300)])
def test_the_sweep_is_that_of_its_definition(shape: tuple[int, int], sparsity: float) -> None:
    weight, mask, rows = drawn(*shape, 2 * shape[1], sparsity)
    values, scale = round_by_inputs(weight, mask, rows)
    nearest, scales = quantize(dense_to_csr(weight, mask), len(weight))
    assert torch.equal(scale, scales)
    assert values.dtype == torch.int8
    found = torch.zeros(shape, dtype=torch.int8)
    found[mask] = values
    assert values.shape == nearest.values.shape
    expected, before, order = slow(weight, mask, rows)
    for row in (found != expected).any(1).nonzero().flatten().tolist():
        # the sweep carries float32: a value amid two steps may go to the other one, and those behind it with it
        first = next(j for j in order.tolist() if found[row, j] != expected[row, j])
        assert float((before[row, first] % 1 - 0.5).abs()) < 1e-3


@pytest.mark.parametrize("scale", [0.0, 2.0**-100, 2.0**100])
def test_the_size_of_inputs_is_of_no_account(scale: float) -> None:
    weight, mask, rows = drawn(5, 16, 40, 0.5)
    values, _ = round_by_inputs(weight, mask, scale * rows)
    expected = quantize(dense_to_csr(weight, mask), 5)[0] if scale == 0 else round_by_inputs(weight, mask, rows)
    assert torch.equal(values, expected.values)


def test_outputs_on_other_rows_change_less_than_by_the_nearest_values() -> None:
    weight, mask, rows = drawn(24, 48, 400, 0.5)
    changes = []
    for values, scale in (round_by_inputs(weight, mask, rows[:200]), quantize(dense_to_csr(weight, mask), 24)):
        rounded = torch.zeros_like(weight)
        rounded[mask] = (values if isinstance(values, Tensor) else values.values).float()
        changes.append(float((rows[200:] @ (rounded * scale[:, None] - weight).T).norm()))
    assert changes[0] < 0.5 * changes[1]


def model_and_example(n_rows: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
    weight, mask, rows = drawn(24, 48, n_rows, 0.5)
    model = sparsify.convert(nn.Sequential(nn.Linear(48, 24)))
    model[0].set_mask(mask)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model.to(dtype), rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_takes_the_values_that_its_judge_chose(dtype: torch.dtype) -> None:
    model, example = model_and_example(400, dtype)
    judge = RoundingJudge(model, "int8-weights", 0.05, example)
    judged, chosen = judge.judge(model[0], 1), judge.take(model[0])
    assert chosen is not None
    assert judge.take(model[0]) is None
    layer = sparsify.export(model, format="csr", quantize="int8-weights", example=example)[0]
    assert isinstance(layer, CSRLinear)
    assert torch.equal(layer.csr.values.float(), (chosen.values * chosen.scale[rows_of(layer)]).to(dtype).float())
    assert layer.rounding == judged
    weight, mask = model[0].weight_matrix.float(), model[0].mask
    expected = round_by_inputs(weight, mask, example.float()[:300])
    assert torch.equal(chosen.values, expected.values)
    plain = RoundingJudge(model, "int8-weights", 0.05, example, by_inputs=False)
    assert judged.by_weights < 0.5 * plain.judge(model[0], 1).by_weights


def rows_of(layer: CSRLinear) -> Tensor:
    return torch.arange(layer.out_features).repeat_interleave(layer.csr.crow.diff())


@pytest.mark.parametrize("why", ["few rows", "no example", "not better", "inf", "asked for"])
def test_the_nearest_values_are_taken_otherwise(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = model_and_example(63 if why == "few rows" else 400)  # of 63 rows 47 are there for 48 inputs
    if why == "inf":
        example[300, 0] = float("inf")
    if why == "not better":
        monkeypatch.setattr(rounding, "round_by_inputs", lambda w, m, r: rounding._nearest(2 * w, m))
    given = None if why == "no example" else example
    judge = RoundingJudge(model, "int8", 0.05, given, by_inputs=why != "asked for")
    judge.judge(model[0], 400)
    chosen, (nearest, scale) = judge.take(model[0]), quantize(dense_to_csr(model[0].weight, model[0].mask), 24)
    assert chosen is not None
    assert torch.equal(chosen.values, nearest.values)
    assert torch.equal(chosen.scale, scale)


def test_convolutions_and_layers_called_twice_are_rounded_by_their_first_call() -> None:
    torch.manual_seed(0)
    image = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2))
    model = sparsify.prune(sparsify.convert(image, types=nn.Conv2d), 0.5).eval()
    x = torch.rand(1, 3, 12, 12) + 1
    judge = RoundingJudge(model, "int8", 0.05, x)
    chosen, grouped = judge.take(model[0]), judge.take(model[2])
    rows = model[0].rows(x).reshape(-1, 27)
    wanted = round_by_inputs(model[0].weight_matrix.flatten(1), model[0].mask.flatten(1), rows[:108])
    nearest, _ = quantize(dense_to_csr(model[2].weight_matrix, model[2].matrix(model[2].mask)), 8)
    assert chosen is not None
    assert torch.equal(chosen.values, wanted.values)
    assert grouped is None or torch.equal(grouped.values, nearest.values)  # groups have inputs of their own

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(48, 48)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    twice = sparsify.prune(sparsify.convert(Twice()), 0.5)
    _, _, example = drawn(1, 48, 400, 0.5)
    judge = RoundingJudge(twice, "int8", 0.05, example)
    chosen = judge.take(twice.layer)
    assert chosen is not None
    assert torch.equal(chosen.values, round_by_inputs(twice.layer.weight, twice.layer.mask, example[:300]).values)


def test_the_model_stays_as_it_was_and_two_exports_are_equal() -> None:
    model, example = model_and_example(400)
    before = copy.deepcopy(model.state_dict())
    exported = [sparsify.export(model, format="csr", quantize="int8", example=example) for _ in range(2)]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(exported[0][0].csr.values, exported[1][0].csr.values)
    again = sparsify.export(exported[0], format="csr", quantize="int8", example=example)
    with torch.no_grad():
        assert float((again(example) - exported[0](example)).norm() / exported[0](example).norm()) < 0.01

"""export(quantize=...): what becomes int8, what stays as it is, and what is said about it."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear
from sparsify.errors import LeftFloatWarning
from sparsify.inference.rounding import RoundingJudge
from sparsify.kernels import FORMS, quantizes_inputs, supports
from sparsify.kernels.reference import quantize_rows
from sparsify.layers.records import Rounding

CPU = torch.device("cpu")
HERE = [form for form in FORMS if supports(form, CPU, torch.float32, quantized=True)]

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(sparsity: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False))
    return sparsify.prune(sparsify.convert(model), sparsity).eval()


def hard() -> nn.Sequential:
    """Return a model whose first layer does not bear int8 weights: one weight of each output is large, for no input."""
    model = pruned(0.0)
    with torch.no_grad():
        model[0].weight[:, 0] = 1e4
    return model


EXAMPLE = torch.linspace(-1, 1, 5 * 32).reshape(5, 32).sin()
EASY = EXAMPLE * (torch.arange(32) > 0)  # without the input of the large weights


@pytest.mark.parametrize("quantize", ["int8", "int8-weights"])
@pytest.mark.parametrize("form", HERE)
def test_every_layer_is_rounded_in_the_form_asked_for(form: str, quantize: str) -> None:
    model = pruned()
    if quantize == "int8-weights" and quantizes_inputs(form):
        with pytest.raises(ValueError, match="rounds the inputs"):
            sparsify.export(model, format=form, quantize=quantize)
        return
    fast = sparsify.export(model, format=form, quantize=quantize, example=EXAMPLE)
    for layer, row in zip((fast[0], fast[2]), sparsify.report(fast), strict=True):
        assert isinstance(layer, CSRLinear)
        assert layer.values.dtype == torch.int8
        assert row.numbers == ("int8" if quantizes_inputs(form) else "int8 weights")
        assert 0 < row.int8_error < 0.02
        assert row.dense_bytes == 4 * layer.in_features * layer.out_features
    assert "int8 error" in str(sparsify.report(fast))
    found, wanted = fast(EXAMPLE).detach(), model(EXAMPLE).detach()
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.03
    assert model[0].weight.dtype == torch.float32


def test_without_quantize_nothing_is_said_of_it() -> None:
    fast = sparsify.export(pruned(), format="csr")
    assert "int8" not in str(sparsify.report(fast))
    assert fast[0].own_dtype is None


def test_auto_takes_int8_whatever_runs_here() -> None:
    fast = sparsify.export(pruned(), quantize="int8", tokens=4, prefer="memory")
    assert [layer.values.dtype for layer in (fast[0], fast[2])] == [torch.int8] * 2
    if not any(form != "csr" for form in HERE):
        assert "no kernel for int8 values runs here" in sparsify.report(fast)[0].reason


def test_the_errors_are_those_of_the_layers_outputs() -> None:
    model = pruned()
    judge = RoundingJudge(model, "int8", 0.05, EXAMPLE)
    rounding = judge.judge(model[0], 7)
    weight = model[0].masked_weight().detach().double()
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    q, step, zero = quantize_rows(EXAMPLE)
    seen = (q.double() - zero[:, None]) * step[:, None].double()

    def relative(outputs: Tensor) -> float:
        wanted = EXAMPLE.double() @ weight.T
        return float((outputs - wanted).norm() / wanted.norm())

    assert rounding.by_weights == pytest.approx(relative(EXAMPLE.double() @ rounded.T), rel=1e-3)
    assert rounding.by_inputs == pytest.approx(relative(seen @ rounded.T), rel=1e-3)
    assert rounding.on_example
    assert not RoundingJudge(model, "int8", 0.05).judge(model[0], 7).on_example


def test_a_layer_that_loses_too_much_stays_float_and_is_named() -> None:
    model = hard()
    with pytest.warns(LeftFloatWarning, match=r"^0: left as they are; .* max_error=0.05; raise max_error"):
        fast = sparsify.export(model, format="csr", quantize="int8", example=EASY)
    rows = sparsify.report(fast)
    assert [row.numbers for row in rows] == ["float32", "int8 weights"]
    assert rows[0].int8_error > 0.05
    assert "int8 weights would change its outputs by" in rows[0].reason
    assert torch.equal(fast[0](EASY), model[0](EASY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_of_it = sparsify.export(model, format="csr", quantize="int8", example=EASY, max_error=2.0)
    assert all_of_it[0].values.dtype == torch.int8
    with pytest.warns(LeftFloatWarning, match=r"^0, 2: left"):
        none_of_it = sparsify.export(model, format="csr", quantize="int8-weights", max_error=0.0)
    assert none_of_it[2].own_dtype is None


def test_a_weight_that_is_no_number_stays_float() -> None:
    model = pruned()
    with torch.no_grad():
        model[0].weight[model[0].mask.nonzero()[0].unbind()] = torch.inf
    with pytest.warns(LeftFloatWarning, match="^0: "):
        fast = sparsify.export(model, format="csr", quantize="int8")
    assert fast[0].own_dtype is None
    assert fast[2].own_dtype is not None


def test_empty_and_silent_layers_are_rounded() -> None:
    model = pruned(1.0)
    fast = sparsify.export(model, format="csr", quantize="int8", example=EXAMPLE)
    assert [row.int8_error for row in sparsify.report(fast)] == [0.0, 0.0]
    assert torch.equal(fast(EXAMPLE), model(EXAMPLE))
    silent = sparsify.export(pruned(), format="csr", quantize="int8", example=torch.zeros(3, 32))
    assert sparsify.report(silent)[0].int8_error == 0.0


def test_what_may_be_int8() -> None:
    assert Rounding(0.01, 0.02, 0.05, True).allowed == "int8"
    assert Rounding(0.01, 0.02, 0.05, True).reason == ""
    assert Rounding(0.01, None, 0.05, True).allowed == "int8-weights"
    assert "int8 inputs would change its outputs by 0.07, over 0.05" in Rounding(0.01, 0.07, 0.05, True).reason
    assert Rounding(0.06, 0.07, 0.05, True).allowed == ""
    assert Rounding(0.01, 0.03, 0.05, True, 0.02).allowed == "int8-weights"
    assert "by 0.03, over 0.02" in Rounding(0.01, 0.03, 0.05, True, 0.02).reason
    assert Rounding(0.01, 0.03, 0.02, True, 0.05).allowed == "int8-weights"
    assert Rounding(float("nan"), float("nan"), 0.05, True).allowed == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize='int4' is none of: int8, int8-weights"),
        ({"quantize": "int8", "format": "dense"}, "no effect with format 'dense'"),
        ({"quantize": "int8", "format": "2:4"}, "does not run on cpu"),
        ({"quantize": "int8", "max_error": -1.0}, "max_error must be at least 0"),
        ({"quantize": "int8", "max_input_error": float("nan")}, "max_input_error must be at least 0, got nan"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify.export(pruned(), **options)


def test_a_model_exported_before_is_rounded_in_a_second_step() -> None:
    model = pruned()
    once = sparsify.export(model, format="csr", quantize="int8")
    twice = sparsify.export(sparsify.export(model, format="csr"), format="csr", quantize="int8")
    assert twice[0].values.dtype == torch.int8
    assert torch.equal(twice(EXAMPLE), once(EXAMPLE))
    dense = sparsify.convert(sparsify.to_dense(sparsify.export(model, format="csr")))  # as loaded from another tool
    again = sparsify.export(sparsify.masks_from_zeros(dense), format="csr", quantize="int8")
    assert torch.equal(again(EXAMPLE), once(EXAMPLE))
    back = sparsify.export(once, format="csr")
    assert back[0].own_dtype is None
    assert torch.equal(back(EXAMPLE), once(EXAMPLE))


def test_a_tied_embedding_has_the_rounded_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    model = sparsify.prune(sparsify.convert(Tied(), tied="share"), 0.5)
    fast = sparsify.export(model, format="csr", quantize="int8")
    assert torch.equal(fast.embedding.weight, fast.head.weight + 0)


def test_to_dense_forgets_the_record() -> None:
    fast = sparsify.export(pruned(), format="csr", quantize="int8")
    dense = sparsify.to_dense(copy.deepcopy(fast))
    assert "rounding" not in vars(dense[0])
    assert "int8" not in str(sparsify.report(dense))


@pytest.mark.parametrize("form", [form for form in HERE if quantizes_inputs(form)])
def test_a_weight_with_too_many_inputs_is_named(form: str) -> None:
    model = sparsify.convert(nn.Sequential(nn.Linear(70_000, 1)))
    with pytest.raises(ValueError, match=f"0: its number of inputs does not fit the form '{form}'"):
        sparsify.export(model, format=form, quantize="int8")


@pytest.mark.parametrize("form", [form for form in HERE if quantizes_inputs(form)])
def test_inputs_that_lose_too_much_stay_as_they_are(form: str) -> None:
    model = pruned()
    spread = EXAMPLE.clone()
    spread[:, 0] = 1e3  # leaves few steps for the other inputs, which alone have weights
    model[0].mask[:, 0] = False
    fast = sparsify.export(model, format=form, quantize="int8", example=spread)
    row = sparsify.report(fast)[0]
    assert row.numbers == "int8 weights"
    assert not quantizes_inputs(fast[0].form)
    assert "int8 inputs would change its outputs by" in row.reason

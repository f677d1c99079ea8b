"""LSTM, GRU, RNN and their cells with masked matrices: torch's results, states, files and copies."""

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.inference.form_selection import FormSelector
from sparsify.layers.held_weight import CSRHeldWeight, SparseHeldWeight

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

TYPES = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
X = torch.linspace(-1, 1, 5 * 3 * 4).reshape(5, 3, 4)
PACKED = nn.utils.rnn.pack_padded_sequence(X, torch.tensor([5, 2, 1]))

#: Every constructor argument.
TABLE: dict[str, tuple[Callable[[], nn.Module], object]] = {
    "lstm": (lambda: nn.LSTM(4, 6), X),
    "lstm of projections": (lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3, batch_first=True), X),
    "gru": (lambda: nn.GRU(4, 5, 2, bias=False, bidirectional=True), PACKED),
    "rnn": (lambda: nn.RNN(4, 5, nonlinearity="relu", bias=False), X[0]),
    "rnn both ways": (lambda: nn.RNN(4, 5, 1, bidirectional=True, batch_first=True, dtype=torch.float32), X),
    "gru of one sequence": (lambda: nn.GRU(4, 3, 2, batch_first=True), X[:, 0]),
    "lstm of packed sequences": (lambda: nn.LSTM(4, 5, bidirectional=True), PACKED),
    "lstm cell": (lambda: nn.LSTMCell(4, 6, bias=False), X[0]),
    "gru cell": (lambda: nn.GRUCell(4, 6), X[0]),
    "rnn cell": (lambda: nn.RNNCell(4, 6, nonlinearity="relu"), X[0]),
}


def flat(output: object) -> Tensor:
    """Return all tensors of an output, one after another."""
    if isinstance(output, Tensor):
        return output.reshape(-1)
    parts = output if isinstance(output, tuple) else ()
    return torch.cat([flat(part) for part in parts if isinstance(part, (Tensor, tuple)) and not _is_index(part)])


def _is_index(part: object) -> bool:
    return isinstance(part, Tensor) and not part.is_floating_point()


def close(y: Tensor, expected: Tensor) -> None:
    """Hold outputs of below 1 to a few last places: torch's small products depend on where their memory begins."""
    torch.testing.assert_close(y, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def held(model: nn.Module) -> dict[str, SparseHeldWeight]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseHeldWeight)}


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", TABLE)
def test_outputs_gradients_and_files_are_those_of_torch_with_zeros(name: str, sparsity: float, tmp_path: Path) -> None:
    build, x = TABLE[name]
    torch.manual_seed(0)
    model = nn.Sequential(build())
    weights = {key: p for key, p in model.named_parameters() if "weight" in key}
    sparsify.prune(sparsify.convert(model, types=TYPES), sparsity)
    assert list(held(model)) == [f"{key}_layer" for key in weights]
    assert all(layer.weight is weights[key.removesuffix("_layer")] for key, layer in held(model).items())
    dense = sparsify.to_dense(copy.deepcopy(model))
    assert type(dense[0]) is type(build())
    assert list(dense.state_dict()) == list(nn.Sequential(build()).state_dict())
    with torch.no_grad():
        for layer in held(model).values():
            layer.weight.masked_fill_(~layer.mask, 3.0)  # as an optimizer might
    for training in (True, False):
        results = [flat(module.train(training)(x)) for module in (model, dense)]
        assert torch.equal(*results)
        for module, y in zip((model, dense), results, strict=True):
            module.zero_grad()
            (y * torch.linspace(-1, 1, y.numel())).sum().backward()
        theirs = dict(dense.named_parameters())
        for key, layer in held(model).items():
            gradient = theirs[key.removesuffix("_layer")].grad * layer.mask
            torch.testing.assert_close(layer.weight.grad, gradient, rtol=0, atol=0)
    with torch.no_grad():
        expected = flat(dense(x))
        dense_export = sparsify.export(model, format="dense")
        for one in (model, dense_export, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            close(flat(one.eval()(x)), expected)
            close(flat(copy.deepcopy(copy.deepcopy(one))(x)), expected)
            sparsify.save(one, tmp_path / "model.safetensors")
            loaded = sparsify.load(tmp_path / "model.safetensors", nn.Sequential(build()))
            close(flat(loaded.eval()(x)), expected)
            assert type(sparsify.to_dense(loaded)[0]) is type(build())


@pytest.mark.parametrize("form", ["csr", "gather", "panel", "bitmask", "sell"])
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", TABLE)
def test_packed_matrices_give_torchs_results_and_gradients(
    name: str, sparsity: float, form: str, tmp_path: Path
) -> None:
    build, x = TABLE[name]
    torch.manual_seed(0)
    model = sparsify.prune(sparsify.convert(nn.Sequential(build()), types=TYPES), sparsity).eval()
    fast, plain = sparsify.export(model, format=form), sparsify.to_dense(copy.deepcopy(model))
    assert {type(layer) for layer in fast[0].children()} == {CSRHeldWeight}
    exact = flat(copy.deepcopy(plain).double()(as_double(x)))
    given = [given_gradients(x) for _ in range(3)]
    outputs = [flat(one(one_x)) for one, (one_x, _) in zip((fast, plain), given, strict=False)]
    assert error(outputs[0], exact) <= 2 * error(outputs[1], exact) + ROUNDINGS
    twice = copy.deepcopy(copy.deepcopy(pickle.loads(pickle.dumps(fast))))
    sparsify.save(fast, tmp_path / "model.safetensors")
    loaded = sparsify.load(tmp_path / "model.safetensors", nn.Sequential(build())).eval()
    for other in (twice, loaded):
        assert torch.equal(flat(other(x)), outputs[0])
    assert {layer.form for layer in fast[0].children()} == {form}
    assert type(sparsify.to_dense(copy.deepcopy(loaded))[0]) is type(build())
    assert torch.equal(flat(sparsify.to_dense(loaded)(x)), flat(plain(x)))
    for (_, leaf), y in zip(given, outputs, strict=False):
        (y * torch.linspace(-1, 1, y.numel())).sum().backward()
        assert leaf.grad is not None
    torch.testing.assert_close(given[0][1].grad, given[1][1].grad, rtol=1e-5, atol=1e-6)
    biases = {key: p.grad for key, p in plain.named_parameters() if "bias" in key}
    assert biases.keys() == {key for key, _ in fast.named_parameters()}
    for key, p in fast.named_parameters():
        torch.testing.assert_close(p.grad, biases[key], rtol=1e-5, atol=1e-6)


#: Of outputs below 1: a place in the last bit at each of the steps.
ROUNDINGS = 5 * torch.finfo(torch.float32).eps


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.detach().double() - exact.detach()).square().mean().sqrt())


def as_double(x: Any) -> Any:
    return nn.utils.rnn.PackedSequence(x.data.double(), *x[1:]) if isinstance(x, tuple) else x.double()


def given_gradients(x: Any) -> tuple[Any, Tensor]:
    """Return an input and its tensor, which gets a gradient."""
    leaf = (x.data if isinstance(x, tuple) else x).clone().requires_grad_()
    return (nn.utils.rnn.PackedSequence(leaf, *x[1:]) if isinstance(x, tuple) else leaf), leaf


def test_a_packed_lstm_takes_states_dropout_and_autocast() -> None:
    torch.manual_seed(0)
    model = sparsify.prune(sparsify.convert(nn.LSTM(4, 6, 2, dropout=0.5), types=nn.LSTM), 0.5)
    fast, states = sparsify.export(model, format="csr"), (torch.randn(2, 3, 6), torch.randn(2, 3, 6))
    torch.testing.assert_close(fast.eval()(X, states), model.eval()(X, states))
    one = (states[0][:, 0], states[1][:, 0])
    torch.testing.assert_close(fast(X[:, 0], one), model(X[:, 0], one))
    results = []
    for module in (model.train(), fast.train()):  # torch's own dropout draws the same numbers
        torch.manual_seed(1)
        results.append(module(X)[0])
    torch.testing.assert_close(*results)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = fast.eval()(X)
    assert y.dtype == h.dtype == c.dtype == torch.bfloat16
    torch.testing.assert_close(y, model.eval()(X)[0].bfloat16(), rtol=0.01, atol=0.01)
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        fast(X[:0])
    torch.testing.assert_close(fast.double()(X.double())[0].float(), model(X)[0])
    cell = sparsify.prune(sparsify.convert(nn.GRUCell(4, 6), types=nn.GRUCell), 0.5)
    torch.testing.assert_close(
        sparsify.export(cell, format="csr")(X[0, 0], h[0, 0].float()), cell(X[0, 0], h[0, 0].float())
    )


@pytest.mark.parametrize(
    ("packed_us", "form", "x"), [(5.0, "gather", None), (20.0, "dense", None), (5.0, "gather", X), (20.0, "dense", X)]
)
def test_the_form_is_measured_for_the_whole_module(
    packed_us: float, form: str, x: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparsify.prune(sparsify.convert(nn.Sequential(nn.LSTM(4, 16)), types=nn.LSTM), 0.9)
    forms = {"dense": 9.0, "gather": 1.0, "panel": 2.0, "bitmask": 2.0}
    shapes, lengths = [], []

    def measured(self: FormSelector, candidates: Mapping[str, nn.Module], x: Tensor) -> tuple[dict[str, float], float]:
        shapes.append(tuple(x.shape))
        return {form: time for form, time in forms.items() if form in candidates}, 0.0

    def whole(self: FormSelector, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        lengths.extend(call()[0].shape[0] for call in calls.values())
        return {"dense": 10.0, "packed": packed_us}

    monkeypatch.setattr(FormSelector, "_measure_quietly", measured)
    monkeypatch.setattr(FormSelector, "times", whole)
    fast = sparsify.export(model, tokens=7 if x is None else None, example=x)
    rows = list(sparsify.report(fast))
    assert [row.format for row in rows] == [form] * 2
    assert shapes == ([(7, 4), (1, 16)] if x is None else [(15, 4), (3, 16)])
    assert lengths == [7 if x is None else 5] * 2
    said = "2.00x dense for" if form == "gather" else "sparse is no faster"
    assert all(said in row.reason for row in rows)
    torch.testing.assert_close(fast(X)[0], model(X)[0])


@torch.no_grad()
def test_an_lstm_is_pruned_on_the_inputs_of_each_product() -> None:
    torch.manual_seed(0)
    errors = {}
    for method in ("magnitude", "sparsegpt"):
        model, x = sparsify.convert(nn.LSTM(6, 16), types=nn.LSTM), torch.randn(9, 4, 6) * torch.linspace(0, 3, 6)
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        expected = model(x)[0]
        sparsify.prune(model, 0.5, method=method, data=None if method == "magnitude" else [x])
        errors[method] = float((model(x)[0] - expected).square().mean())
        assert all(layer.sparsity == 0.5 for layer in held(model).values())
    assert errors["sparsegpt"] < 0.7 * errors["magnitude"]


def test_a_dense_state_loads_and_an_optimizer_leaves_the_zeros() -> None:
    torch.manual_seed(0)
    model, other = (sparsify.convert(nn.LSTM(4, 8), types=nn.LSTM) for _ in range(2))
    dense = nn.LSTM(4, 8)
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model(X)[0], dense(X)[0])
    sparsify.prune(model, 0.8)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    model(X)[0].square().sum().backward()
    optimizer.step()
    assert int((model.weight_hh_l0 == 0).sum()) == round(0.8 * 32 * 8)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X)[0], model(X)[0])
    assert str(model).startswith(
        "FunctionalLSTM(\n  4, 8\n  (weight_ih_l0_layer): SparseHeldWeight(32x4, sparsity=0.7969)"
    )
    expected = model(X)[0]
    torch.testing.assert_close(model.double()(X.double())[0].float(), expected)


def test_files_are_compact_and_the_report_counts_the_work(tmp_path: Path) -> None:
    model = sparsify.prune(sparsify.convert(nn.LSTM(32, 64), types=nn.LSTM), 0.9)
    for one in (model, sparsify.export(model)):
        found = sparsify.report(one, torch.randn(5, 2, 32)).coverage
        assert found.n_covered == 256 * 96
        assert found.n_covered_multiply_adds == found.n_multiply_adds == 10 * 256 * 96
        sparsify.save(one, tmp_path / "model.safetensors")
        assert (tmp_path / "model.safetensors").stat().st_size < 0.25 * 256 * 96 * 4


def test_what_cannot_be_taken_apart_says_why() -> None:
    pruned = nn.LSTM(4, 6)
    nn.utils.prune.l1_unstructured(pruned, "weight_ih_l0", 0.5)
    with pytest.raises(ValueError, match=r"its weight_ih_l0 is pruned by torch; .*prune\.remove"):
        sparsify.convert(nn.Sequential(pruned), types=nn.LSTM)
    with pytest.warns(sparsify.LeftDenseWarning, match=r"lstm|types=\[torch.nn.Linear, torch.nn.GRU\] takes such"):
        sparsify.convert(nn.Sequential(nn.GRU(4, 6), nn.Linear(2, 2)))

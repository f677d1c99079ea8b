"""LSTM, GRU, RNN and their cells with masked matrices: torch's results, states, files and copies."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.layers.held_weight import SparseHeldWeight

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
        for one in (model, sparsify.export(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(flat(one.eval()(x)), expected)
            assert torch.equal(flat(copy.deepcopy(copy.deepcopy(one))(x)), expected)
            sparsify.save(one, tmp_path / "model.safetensors")
            loaded = sparsify.load(tmp_path / "model.safetensors", nn.Sequential(build()))
            assert torch.equal(flat(loaded.eval()(x)), expected)
            assert type(sparsify.to_dense(loaded)[0]) is type(build())


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
    model = sparsify.convert(nn.Sequential(nn.GRU(4, 6)), types=nn.GRU)
    with pytest.raises(ValueError, match="a SparseHeldWeight does not multiply its weight with rows"):
        sparsify.prune(model, 0.5, method="wanda", data=[X])

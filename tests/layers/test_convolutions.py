"""Convolutions of every type and setting under a mask: torch's results, exact counts, compact files, and back."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tested_kernels import needs_native
from torch import Tensor, nn

import sparsify
from sparsify.layers.sparse_convolution import SparseConvolution
from sparsify.masking.patterns import nm_mask

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

#: Every constructor argument, on odd sizes: the convolution, and the shape of an input.
TABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "1d strided": (lambda: nn.Conv1d(4, 6, 5, stride=3, padding=2, dilation=2, groups=2), (2, 4, 19)),
    "1d circular": (lambda: nn.Conv1d(3, 5, 4, padding=2, padding_mode="circular", bias=False), (3, 7)),
    "2d": (lambda: nn.Conv2d(3, 7, 3, padding=1), (2, 3, 5, 7)),
    "2d uneven": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (1, 4, 9, 6)),
    "2d same": (lambda: nn.Conv2d(4, 6, (5, 3), padding="same", dilation=2, groups=2), (2, 4, 5, 6)),
    "2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (1, 2, 5, 5)),
    "2d replicate": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="replicate"), (1, 2, 5, 7)),
    "2d strided pointwise": (lambda: nn.Conv2d(4, 6, 1, stride=2, padding="valid"), (2, 4, 5, 5)),
    "2d depthwise": (lambda: nn.Conv2d(5, 10, 3, padding=1, groups=5), (2, 5, 4, 4)),
    "2d of one image": (
        lambda: nn.Conv2d(3, 5, (3, 1), padding_mode="zeros", dtype=torch.float32),
        (3, 7, 5),
    ),
    "3d circular": (
        lambda: nn.Conv3d(4, 2, 2, padding=1, padding_mode="circular", dilation=2, groups=2),
        (1, 4, 3, 3, 5),
    ),
    "3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=2, padding=(0, 1, 1)), (1, 2, 3, 5, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed 1d groups": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, dilation=2, groups=2), (4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 2), padding=(3, 0), groups=2), (2, 4, 6, 5)),
    "transposed 2d dilated": (
        lambda: nn.ConvTranspose2d(3, 5, 3, stride=(3, 2), output_padding=(2, 1), dilation=2, bias=False),
        (2, 3, 3, 4),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), (1, 2, 2, 3, 1)),
}


def masked(
    name: str, sparsity: float, dtype: torch.dtype = torch.float32
) -> tuple[SparseConvolution, nn.Module, Tensor]:
    """Return a masked convolution, the dense one with the same weights and zeros, and an input."""
    torch.manual_seed(0)
    build, shape = TABLE[name]
    model = sparsify.prune(sparsify.convert(nn.Sequential(build().to(dtype)), types=TYPES), sparsity)
    layer = model[0]
    mask = layer.matrix(layer.mask).clone()
    mask[1] &= sparsity == 0  # an empty row
    layer.set_mask(mask)
    return layer, sparsify.to_dense(copy.deepcopy(model))[0], torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", TABLE)
def test_outputs_and_gradients_are_those_of_torch_with_zeros(name: str, sparsity: float) -> None:
    layer, dense, x = masked(name, sparsity)
    assert type(dense) is layer.dense_type
    assert str(dense) == str(TABLE[name][0]())
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.mask, 3.0)  # as an optimizer might
    results = []
    for module in (layer, dense):
        for training in (True, False):
            own = x.clone().requires_grad_()
            y = module.train(training)(own)
            y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
            results.append((y, own.grad))
    for y, gradient in results[1:]:
        assert torch.equal(y, results[0][0])
        torch.testing.assert_close(gradient, results[0][1], rtol=0, atol=0)
    assert torch.equal(layer.weight.grad, dense.weight.grad * layer.mask)
    assert layer.bias is None or torch.equal(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("form", ["csr", pytest.param("panel", marks=needs_native)])
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", TABLE)
def test_exported_outputs_and_gradients_are_those_of_torch(name: str, sparsity: float, form: str) -> None:
    layer, dense, x = masked(name, sparsity)
    fast = sparsify.export(nn.Sequential(layer), format=form)[0]
    results = []
    for module, given in ((fast, x), (dense, x), (copy.deepcopy(dense).double(), x.double())):
        own = given.clone().requires_grad_()
        y = module.eval()(own)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
        bias = [] if module.bias is None else [module.bias.grad]
        results.append([tensor.detach() for tensor in (y, own.grad, *bias)])
    for ours, theirs, exact in zip(*results, strict=True):
        assert error(ours, exact) <= 2 * error(theirs, exact) + 4 * torch.finfo(torch.float32).eps * size(exact)


def error(tensor: Tensor, exact: Tensor) -> float:
    return size(tensor.double() - exact)


def size(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


@pytest.mark.parametrize("name", TABLE)
def test_rows_times_the_matrix_are_the_outputs(name: str) -> None:
    layer, _, x = masked(name, 0.5, torch.float64)
    groups = layer.groups
    weight = layer.weight_matrix.reshape(groups, -1, layer.shape[1])
    rows = layer.rows(x) if groups > 1 else layer.rows(x).unsqueeze(-2)  # (..., positions, groups, in)
    y = torch.einsum("...gi,goi->...go", rows, weight).flatten(-2)
    y = y if layer.bias is None else y + layer.bias
    batch = x.dim() - len(layer.kernel_size) - 1
    torch.testing.assert_close(y.movedim(-1, batch), layer(x))


@pytest.mark.parametrize("name", TABLE)
def test_a_matrix_goes_back_into_the_weight(name: str) -> None:
    layer, _, _ = masked(name, 0.5)
    assert layer.matrix(layer.weight).shape == layer.shape
    assert torch.equal(layer.as_weight(layer.weight_matrix), layer.weight)
    again = type(layer).from_matrix(
        layer.weight_matrix, layer.matrix(layer.mask), layer.bias, type(layer).settings_of(layer)
    )
    assert torch.equal(again.weight, layer.weight)
    assert torch.equal(again.mask, layer.mask)


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding="same", padding_mode="circular", bias=False),
        nn.ConvTranspose2d(32, 8, 2, stride=2, groups=4),
        nn.Conv2d(8, 8, 1),
    ).eval()


CONVOLUTIONS = ("0", "3", "4", "5")
X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_mask_holds_in_training_and_in_either_memory_layout(memory_format: torch.memory_format) -> None:
    model = sparsify.convert(stack(), types=TYPES).to(memory_format=memory_format)
    sparsify.prune(model, 0.7, method="random", seed=1)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    for name in CONVOLUTIONS:
        layer = model.get_submodule(name)
        assert int((layer.weight == 0).sum()) == round(0.7 * layer.weight.numel())
        assert not layer.weight[~layer.mask].any()
    dense = sparsify.to_dense(copy.deepcopy(model))
    assert torch.equal(dense.eval()(X), model.eval()(X))


def test_patterns_go_along_the_kernels_of_the_inputs_of_one_output() -> None:
    conv = nn.Conv2d(4, 6, 3)
    before = conv.weight.detach().clone()
    layer = sparsify.prune(sparsify.convert(conv, types=nn.Conv2d), pattern="2:4")
    assert torch.equal(layer.mask, nm_mask(before.flatten(1).abs(), 2, 4).reshape(6, 4, 3, 3))
    sparsify.prune(layer, 0.5, pattern="rows")
    assert layer.mask.flatten(1).any(1).sum() == 3
    with pytest.raises(ValueError, match=r"divisible by \(1, 5\), got \(6, 36\)"):
        sparsify.prune(layer, 0.5, pattern="1x5")


@pytest.mark.parametrize("build", [lambda: nn.Conv2d(8, 8, 3), lambda: nn.ConvTranspose1d(8, 8, 3, groups=2)])
def test_a_mask_of_torch_prune_is_taken_over(build: Callable[[], nn.Module]) -> None:
    conv = build()
    nn.utils.prune.random_unstructured(conv, "weight", 0.5)
    expected = conv.weight.detach().clone()
    sparsify.convert(conv, types=TYPES)
    assert conv.sparsity == 0.5
    assert torch.equal(conv.weight, expected)
    assert torch.equal(conv.mask, expected != 0)


def test_copies_pickles_states_and_files(tmp_path: Path) -> None:
    model = sparsify.prune(sparsify.convert(stack(), types=TYPES), 0.9)
    expected = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), expected)
    fresh = sparsify.convert(stack(), types=TYPES)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), expected)
    fast = sparsify.export(model, format="csr")
    assert [type(fast.get_submodule(name)).__name__ for name in CONVOLUTIONS] == [
        *("CSRConv2d", "Conv2d", "ConvTranspose2d", "CSRConv2d")
    ]
    assert {row.name: row.reason for row in sparsify.report(fast)}["3"].startswith("no sparse kernel")
    dense_bytes = sum(t.nbytes for t in model.state_dict().values() if t.dtype != torch.bool)
    for one, types in ((fast, "Conv2d"), (model, "SparseConv2d")):
        sparsify.save(one, tmp_path / "model.safetensors")
        assert (tmp_path / "model.safetensors").stat().st_size < 0.5 * dense_bytes
        loaded = sparsify.load(tmp_path / "model.safetensors", stack())
        assert type(loaded[3]).__name__ == types
        assert torch.equal(loaded[3].weight, model[3].weight)
        torch.testing.assert_close(loaded(X), expected)
    assert torch.equal(sparsify.to_dense(loaded)(X), expected)


def test_a_packed_entry_does_not_load_onto_a_convolution_without_a_packed_form(tmp_path: Path) -> None:
    fast = sparsify.export(sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(18, 4))), 0.5), format="csr")
    sparsify.save(fast, tmp_path / "linear.safetensors")
    with pytest.raises(sparsify.CheckpointError, match="0 is packed in the file, and the model has a Conv2d there"):
        sparsify.load(
            tmp_path / "linear.safetensors", nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"))
        )


def test_a_kernel_of_another_shape_than_the_settings_stays_dense() -> None:
    conv = nn.Conv2d(2, 4, 3)
    conv.weight = nn.Parameter(torch.ones(4, 2, 1, 1))
    with pytest.warns(sparsify.LeftDenseWarning, match=r"where a kernel of \(3, 3\) is needed"):
        sparsify.convert(nn.Sequential(conv, nn.Conv2d(2, 2, 1)), types=nn.Conv2d)

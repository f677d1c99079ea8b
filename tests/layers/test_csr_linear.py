"""CSRLinear as a module: it behaves like the masked layer through copies, files, dtypes, devices, compilers."""

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import DTYPES, SHAPES, masks, weight
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear, SparseLinear
from sparsify.kernels.csr import CSR

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def sparse_layer(
    shape: tuple[int, int] = (12, 8), sparsity: float = 0.75, *, bias: bool = True, seed: int = 0
) -> SparseLinear:
    torch.manual_seed(seed)
    return SparseLinear(shape[1], shape[0], sparsity, bias=bias, seed=seed)


def model(seed: int = 0, sparsity: float = 0.75) -> nn.Sequential:
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4, bias=False))
    return sparsify.prune(sparsify.convert(dense), sparsity)


def exported(seed: int = 0, sparsity: float = 0.75) -> nn.Sequential:
    return sparsify.export(model(seed, sparsity), format="csr").eval()


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(module: nn.Module) -> nn.Module:
    fresh = exported(seed=7)
    fresh.load_state_dict(module.state_dict())
    return fresh


def through_state_dict_of_another_nnz(module: nn.Module) -> nn.Module:
    fresh = exported(seed=7, sparsity=0.25)
    fresh.load_state_dict(module.state_dict())
    return fresh


def through_assigned_state_dict(module: nn.Module) -> nn.Module:
    fresh = exported(seed=7, sparsity=0.25)
    fresh.load_state_dict(module.state_dict(), assign=True)
    return fresh


def through_safe_weights_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = exported(seed=7)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def through_dtypes_and_back(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double().float()


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_torch_save,
    "state_dict": through_state_dict,
    "state_dict of another nnz": through_state_dict_of_another_nnz,
    "state_dict assigned": through_assigned_state_dict,
    "weights_only file": through_safe_weights_file,
    "dtypes": through_dtypes_and_back,
    "deepcopy of a deepcopy": lambda module: copy.deepcopy(copy.deepcopy(module)),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_gives_the_same_outputs_and_shares_nothing(way: str) -> None:
    original = exported()
    twin = COPIES[way](original)
    x = torch.randn(5, 8)
    before = original(x)
    assert torch.equal(twin(x), before)
    if way == "state_dict assigned":  # shares by design
        return
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert torch.equal(original(x), before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_those_of_the_masked_layer(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tried = 0
    for mask in masks(shape).values():
        layer = sparse_layer(shape).to(dtype)
        layer.set_mask(mask)
        packed = CSRLinear.from_sparse(layer)
        x = weight((3, shape[1]), dtype, seed=3)
        assert torch.equal(packed(x), layer(x))  # the reference kernel multiplies the very same dense weight
        assert torch.equal(packed.weight, layer.masked_weight())
        assert packed.sparsity == layer.sparsity
        assert packed.n_kept == int(mask.sum())
        tried += 1
    assert tried == 5


def test_from_and_to_sparse_keep_the_mask_and_kept_zeros_and_share_the_bias() -> None:
    layer = sparse_layer()
    kept = layer.mask.nonzero()[0]
    with torch.no_grad():
        layer.weight[kept[0], kept[1]] = 0.0
    packed = CSRLinear.from_sparse(layer.eval())
    back = packed.to_sparse()
    assert torch.equal(back.mask, layer.mask)
    assert torch.equal(back.weight, layer.weight)
    assert back.bias is packed.bias is layer.bias
    assert not packed.training
    assert not back.training
    back.train()(torch.randn(2, 8)).sum().backward()
    assert back.weight.grad is not None


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_reaches_input_and_bias(bias: bool) -> None:
    layer = sparse_layer(bias=bias)
    packed = copy.deepcopy(CSRLinear.from_sparse(layer))
    x = torch.randn(3, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    packed(x).square().sum().backward()
    layer(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert [name for name, _ in packed.named_parameters()] == (["bias"] if bias else [])
    if bias:
        torch.testing.assert_close(packed.bias.grad, layer.bias.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_another_dtype_takes_only_the_numbers_along(dtype: torch.dtype) -> None:
    layer = sparse_layer()
    packed = CSRLinear.from_sparse(layer).to(dtype)
    masked = copy.deepcopy(layer).to(dtype)
    x = torch.randn(3, 8, dtype=dtype)
    assert packed(x).dtype == dtype
    assert torch.equal(packed(x), masked(x))
    assert torch.equal(packed.weight, masked.masked_weight())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_its_dtype_like_a_dense_layer(dtype: torch.dtype) -> None:
    layer, x = sparse_layer(), torch.randn(3, 8)
    packed = CSRLinear.from_sparse(layer)
    with torch.autocast("cpu", dtype=dtype):
        found, wanted = packed(x), layer(x)
        assert packed(x.double().float().to(dtype)).dtype == dtype
    assert found.dtype == wanted.dtype == dtype
    assert torch.equal(found, layer(x).to(dtype))  # worked out in float32, so nearer the truth than `wanted`
    assert packed.weight.dtype == torch.float32
    assert packed(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):  # torch leaves float64 alone
        assert copy.deepcopy(packed).double()(x.double()).dtype == torch.float64


def test_gradients_under_autocast() -> None:
    layer = sparse_layer()
    packed = copy.deepcopy(CSRLinear.from_sparse(layer))
    x, y = (torch.ones(3, 8, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed(x).float().sum().backward()
        layer(y).float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, y.grad, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(packed.bias.grad, layer.bias.grad)


def test_compile_without_graph_breaks() -> None:
    torch.compiler.reset()
    module = exported()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(5, 8), torch.randn(7, 8), torch.randn(2, 3, 8)):
        assert torch.equal(compiled(x), module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), module(x))
    x = torch.randn(5, 8, requires_grad=True)
    compiled(x).sum().backward()
    twin = x.detach().clone().requires_grad_()
    module(twin).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch 2.13's own
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs g++ or clang++")
def test_compile_with_inductor() -> None:
    torch.compiler.reset()
    module = exported()[0]  # one layer: what takes the time is the C++ compiler
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))


def test_export_save_and_load_of_the_program(tmp_path: Path) -> None:
    module = exported()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (torch.randn(5, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for n in (2, 5, 9):
        x = torch.randn(n, 8)
        assert torch.equal(loaded(x), module(x))


def test_use_from_several_threads() -> None:
    module, x = exported(), torch.randn(64, 8)
    wanted = module(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, wanted) for found in pool.map(lambda _: module(x), range(32)))


def test_share_memory() -> None:
    module = copy.deepcopy(exported())
    assert all(tensor.is_shared() for tensor in module.share_memory().state_dict().values())


@CUDA
def test_to_cuda_and_back() -> None:
    module, x = exported(), torch.randn(5, 8)
    there = copy.deepcopy(module).cuda()
    torch.testing.assert_close(there(x.cuda()).cpu(), module(x))
    assert torch.equal(there.cpu()(x), module(x))


def test_wrong_inputs_are_refused() -> None:
    packed = CSRLinear.from_sparse(sparse_layer())
    with pytest.raises(RuntimeError, match="takes inputs of shape"):
        packed(torch.randn(2, 9))
    with pytest.raises(RuntimeError, match="but the input is"):
        packed(torch.randn(2, 8).double())


def test_repr_says_what_it_is() -> None:
    assert (
        repr(CSRLinear.from_sparse(sparse_layer()))
        == "CSRLinear(in_features=8, out_features=12, bias=True, sparsity=0.75)"
    )


# What the buffers are called, and what a state_dict with other ones does.


def test_buffers_are_plain_and_narrow() -> None:
    packed = CSRLinear.from_sparse(sparse_layer())
    state = packed.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "bias": torch.float32,
        "crow": torch.int32,
        "col": torch.uint8,
        "values": torch.float32,
    }
    assert all(tensor.layout == torch.strided for tensor in state.values())


def broken(state: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {**state, name: change(state[name].clone())}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0.col", lambda col: col.flip(0)),
        ("0.col", lambda col: torch.full_like(col, 8)),
        ("0.col", lambda col: col.to(torch.int32)),
        ("0.crow", lambda crow: crow + 1),
        ("0.crow", lambda crow: crow[:-1]),
        ("0.values", lambda values: values[1:]),
    ],
)
def test_a_broken_state_dict_is_refused_and_changes_nothing(name: str, change: Callable[[Tensor], Tensor]) -> None:
    module = exported()
    fresh = exported(seed=7, sparsity=0.5)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(RuntimeError, match="0: "):
        fresh.load_state_dict(broken(module.state_dict(), name, change))
    for key in ("crow", "col", "values"):
        assert torch.equal(fresh.state_dict()["0." + key], before["0." + key])


def test_a_state_dict_of_another_layer_shape_is_refused() -> None:
    wide = sparsify.export(sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(300, 12))), 0.5), format="csr")
    with pytest.raises(RuntimeError, match="column indices"):
        sparsify.export(
            sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(8, 12))), 0.5), format="csr"
        ).load_state_dict(wide.state_dict())


def test_a_state_dict_without_the_weight_is_missing_keys() -> None:
    module = exported()
    state = {key: tensor for key, tensor in module.state_dict().items() if key != "0.col"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.col"'):
        module.load_state_dict(state)


def test_a_layer_cannot_be_built_from_a_broken_weight() -> None:
    good = CSRLinear.from_sparse(sparse_layer()).csr
    with pytest.raises(ValueError, match="row pointers"):
        CSRLinear(8, 11, good)
    with pytest.raises(ValueError, match="strictly increasing"):
        CSRLinear(8, 12, CSR(good.crow, good.col.flip(0), good.values))

"""Everyday uses of PyTorch models keep working on a converted one and on an exported one."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import sparsify
from sparsify import CSRLinear, SparseLinear, convert, export, prune, to_dense

X = torch.linspace(-1, 1, 24).reshape(3, 8)


def dense(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def masked() -> nn.Module:
    return prune(convert(dense()), 0.75).eval()


def exported() -> nn.Module:
    return export(masked(), format="csr")


def measured() -> nn.Module:
    return export(masked(), tokens=3)


each = pytest.mark.parametrize("build", [masked, exported, measured], ids=["masked", "csr", "auto"])


@each
def test_is_pruned_answers_for_torchs_own_pruning(build: Callable[[], nn.Module]) -> None:
    model = build()
    assert not torch_prune.is_pruned(model)
    model.add_module("extra", torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
    assert torch_prune.is_pruned(model)
    converted = convert(nn.Sequential(torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)))
    assert not torch_prune.is_pruned(converted)  # the mask was taken over, and the hook is gone
    assert converted[0].sparsity == 0.5


def test_torchs_own_pruning_on_a_converted_layer_prunes_on() -> None:
    layer = prune(convert(nn.Linear(8, 4)), 0.5)
    torch_prune.l1_unstructured(layer, "weight", 0.75)
    torch_prune.remove(layer, "weight")
    assert int((layer.masked_weight() == 0).sum()) == 24
    assert isinstance(layer, SparseLinear)


@each
def test_counting_zeros_as_people_do(build: Callable[[], nn.Module]) -> None:
    zeros = [float((layer.weight == 0).sum()) / layer.weight.nelement() for layer in (build()[0], build()[2])]
    assert zeros == [0.75, 0.75]


@each
@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=["half", "bf16", "f64"])
def test_another_precision(build: Callable[[], nn.Module], change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(build())
    dtype = next(model.parameters()).dtype
    reference = change(to_dense(masked()))
    torch.testing.assert_close(model(X.to(dtype)), reference(X.to(dtype)))
    assert model(X.to(dtype)).dtype == dtype


@each
def test_a_state_dict_goes_through_torch_save(build: Callable[[], nn.Module]) -> None:
    model, file = build(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = prune(convert(dense(1)), 0.25).eval()
    fresh = fresh if build is masked else export(fresh, format="csr")
    if build is measured:
        fresh = copy.deepcopy(model)
        for tensor in fresh.parameters():
            tensor.data.zero_()
    assert not torch.equal(fresh(X), model(X))
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(X), model(X))


@each
def test_deepcopy_is_independent(build: Callable[[], nn.Module]) -> None:
    model = build()
    expected, twin = model(X), copy.deepcopy(model)
    assert torch.equal(twin(X), expected)
    with torch.no_grad():
        twin[0].bias.add_(1.0)
    assert not torch.equal(twin(X), expected)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(  # torch's own plain average of buffers cannot subtract bools
    ("average", "use_buffers"),
    [(None, False), (get_ema_multi_avg_fn(0.5), False), (get_ema_multi_avg_fn(0.5), True)],
    ids=["SWA", "EMA", "EMA with buffers"],
)
def test_averaged_models_keep_the_mask(average: Callable[..., None] | None, use_buffers: bool) -> None:
    model = masked().train()
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
    layer = averaged.module[0]
    assert isinstance(layer, SparseLinear)
    assert layer.mask.dtype == torch.bool
    assert torch.equal(layer.mask, model[0].mask)
    assert not layer.weight[~layer.mask].any()
    assert not torch.equal(layer.weight, model[0].weight)
    fast = export(averaged.module, format="csr")
    torch.testing.assert_close(fast(X), averaged(X))


class Features(Dataset[Tensor]):
    """Computes its items with a model, in the workers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        result: Tensor = self.model(X * (index + 1))
        return result


@each
def test_workers_that_were_forked(build: Callable[[], nn.Module]) -> None:
    model = build()
    with torch.no_grad():
        expected = torch.stack([model(X * (index + 1)) for index in range(4)])  # the parent's threads have run by now
        loader = DataLoader(Features(model), batch_size=1, num_workers=2, multiprocessing_context="fork")
        found = torch.cat(list(loader))
    torch.testing.assert_close(found, expected)


@each
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(build: Callable[[], nn.Module]) -> None:
    model = build()
    with torch.no_grad():
        traced = torch.jit.trace(model, X)
        for x in (X, torch.randn(7, 8)):
            torch.testing.assert_close(traced(x), model(x))


def run_onnx(model: nn.Module, path: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Export by the plain call; return the outputs that ONNX Runtime computes, and the weights in the file."""
    pytest.importorskip("onnxscript", reason="onnxscript is missing: pip install onnxscript")
    onnx = pytest.importorskip("onnx", reason="onnx is missing: pip install onnx")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install onnxruntime")
    torch.onnx.export(model, (X,), str(path), dynamo=True, verbose=False, external_data=False)
    graph = onnx.load(path).graph
    weights = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    return [torch.from_numpy(output) for output in outputs], weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "build",
    [masked, lambda: to_dense(copy.deepcopy(exported()))],
    ids=["masked", "to_dense"],
)
def test_onnx_gets_dense_weights_with_zeros(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    (found,), weights = run_onnx(build(), tmp_path / "model.onnx")
    torch.testing.assert_close(found, masked()(X))
    matrices = [weight for weight in weights.values() if weight.ndim == 2]
    assert sorted(weight.numel() for weight in matrices) == [64, 128]
    assert all((weight == 0).float().mean() == 0.75 for weight in matrices)
    assert not any(weight.dtype == torch.bool for weight in weights.values())  # the mask is not in the file


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_an_exported_model_says_what_to_do() -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is missing: pip install onnxscript")
    fast = exported()
    assert isinstance(fast[0], CSRLinear)
    with pytest.raises(Exception, match=r"ONNX has no sparse layers; .*sparsify\.to_dense\(copy\.deepcopy\(model\)\)"):
        torch.onnx.export(fast, (X,), dynamo=True, verbose=False)
    assert torch.equal(fast(X), exported()(X))
    assert sparsify.report(fast)[0].format == "csr"

"""load gives back all that save writes, on a model built anew; save refuses the rest, with the way out."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

import sparsify
from sparsify import CheckpointError
from sparsify.checkpoint import container

#: In the small model here, the modules that do not convert have most of the weights.
pytestmark = pytest.mark.filterwarnings("ignore:most weights stay dense:sparsify.LeftDenseWarning")

X = torch.linspace(-1, 1, 24).reshape(3, 8)


class Net(nn.Module):
    """A Linear, and two modules that are no layer of ours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.lstm, self.fc = nn.Conv1d(8, 8, 1), nn.LSTM(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(self.conv(x.T).T)[0])


def fresh() -> Net:
    model = Net()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model.eval()


def prune_all(model: Net) -> nn.Module:
    for module, key in (
        (model.conv, "weight"),
        (model.conv, "bias"),
        (model.lstm, "weight_hh_l0"),
        (model.fc, "weight"),
    ):
        torch_prune.l1_unstructured(module, key, 0.5)
    return sparsify.convert(model)


def prune_converted(model: Net) -> nn.Module:
    sparsify.convert(model)
    torch_prune.l1_unstructured(model.fc, "weight", 0.25)
    with torch.no_grad():
        model.fc.weight_orig.add_(1)  # as an optimizer does: the hook's own result is behind until the next forward
    return model


def weight_norm_converted(model: Net) -> nn.Module:
    sparsify.prune(sparsify.convert(model), 0.5)
    parametrizations.weight_norm(model.fc)
    with torch.no_grad():
        model.fc.parametrizations.weight.original0.mul_(3)
    return model


def bias_parametrized(model: Net) -> nn.Module:
    sparsify.prune(sparsify.convert(model), 0.5)
    parametrize.register_parametrization(model.fc, "bias", nn.Tanh())
    return model


def compile_part(model: Net) -> nn.Module:
    model.fc = torch.compile(model.fc, backend="eager")
    return model


#: Models as users leave them; each comes back on a plain one, with the same outputs.
LOADABLE: dict[str, Callable[[Net], nn.Module]] = {
    "pruned by torch": prune_all,
    "pruned by torch and exported": lambda m: sparsify.export(prune_all(m), format="csr"),
    "pruned by torch after convert": prune_converted,
    "weight_norm on a converted layer": weight_norm_converted,
    "a parametrized bias": bias_parametrized,
    "nn.DataParallel": lambda m: nn.DataParallel(sparsify.prune(sparsify.convert(m), 0.5)),
    "converted in nn.DataParallel": lambda m: sparsify.prune(sparsify.convert(nn.DataParallel(m)), 0.5),
    "torch.compile": lambda m: torch.compile(sparsify.prune(sparsify.convert(m), 0.5), backend="eager"),
    "a part compiled": lambda m: compile_part(sparsify.prune(sparsify.convert(m), 0.5)),
    "both, exported": lambda m: sparsify.export(
        sparsify.prune(sparsify.convert(nn.DataParallel(compile_part(m))), 0.5), format="csr"
    ),
}

#: Models to load onto.
TARGETS: dict[str, Callable[[Net], nn.Module]] = {
    "plain": lambda m: m,
    "nn.DataParallel": nn.DataParallel,
    "a part compiled": compile_part,
    "compiled": lambda m: torch.compile(m, backend="eager"),
}


@pytest.mark.parametrize("name", LOADABLE)
def test_a_model_comes_back_on_one_built_anew(tmp_path: Path, name: str) -> None:
    model = LOADABLE[name](Net().eval()).eval()
    sparsify.save(model, tmp_path / "model")
    for target, wrap in TARGETS.items():
        loaded = sparsify.load(tmp_path / "model", wrap(fresh()))
        with torch.inference_mode():
            torch.testing.assert_close(loaded(X), model(X), msg=target)
    raw = ("module", "_orig", "_mask", "parametrizations")
    assert not any(part in key for key in container.read(tmp_path / "model")[0].tensors for part in raw)


def test_files_that_have_names_of_wrappers_in_them_load_as_before(tmp_path: Path) -> None:
    model = sparsify.prune(sparsify.convert(Net().eval()), 0.5)
    sparsify.save(model, tmp_path / "plain")
    header, tensors = container.read(tmp_path / "plain")
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        layers = {prefix + name: entry for name, entry in header.layers.items()}
        container.write(
            tmp_path / "old", layers, {}, {}, {prefix + name: tensor for name, tensor in tensors.items()}, {}
        )
        for wrap in TARGETS.values():
            loaded = sparsify.load(tmp_path / "old", wrap(fresh()))
            with torch.inference_mode():
                torch.testing.assert_close(loaded(X), model(X))


def test_a_child_called_module_is_no_wrapper(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.module = nn.Sequential(nn.Linear(4, 4))
        return model

    sparsify.save(sparsify.prune(sparsify.convert(build()), 0.5), tmp_path / "model")
    assert list(container.read(tmp_path / "model")[0].layers) == ["module.0"]
    sparsify.load(tmp_path / "model", build())
    sparsify.load(tmp_path / "model", nn.Sequential(nn.Linear(4, 4)))


def test_checkpoint_wrappers_of_torch_leave_no_name(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrapped(model: Net) -> Net:
        model.fc = checkpoint_wrapper(model.fc)
        return model

    model = sparsify.prune(sparsify.convert(wrapped(Net().eval())), 0.5)
    sparsify.save(model, tmp_path / "model")
    for target in (fresh(), wrapped(fresh())):
        torch.testing.assert_close(sparsify.load(tmp_path / "model", target)(X), model(X))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, torch.nn.utils.spectral_norm])
def test_another_module_that_is_parametrized_is_named_and_comes_back_on_its_like(
    tmp_path: Path, norm: Callable[[nn.Module], nn.Module]
) -> None:
    model, same = Net().eval(), fresh()
    norm(model.conv)
    norm(same.conv)
    sparsify.prune(sparsify.convert(model), 0.5)
    with pytest.warns(sparsify.SavedParametrizedWarning, match="^conv: parametrized, and stored so; .*remove_param"):
        sparsify.save(model, tmp_path / "model")
    torch.testing.assert_close(sparsify.load(tmp_path / "model", same)(X), model(X))
    with pytest.raises(CheckpointError, match="for another architecture"):
        sparsify.load(tmp_path / "model", fresh())


def register(name: str, value: Tensor) -> Callable[[Net], object]:
    return lambda model: model.conv.register_buffer(name, value)


class Wrapper(Tensor):
    """A tensor around another, as quantized ones are."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [], None


def old_norm(model: Net) -> None:
    sparsify.convert(model)
    spectral_norm(model.fc)


#: State that load cannot give back, and the words of the way out.
REFUSED: dict[str, tuple[Callable[[Net], object], str]] = {
    "complex": (register("freqs", torch.ones(2, dtype=torch.complex64)), r"conv\.freqs: .*view_as_real .*persistent"),
    "sparse": (register("graph", torch.eye(2).to_sparse()), r"conv\.graph: .*make it a dense tensor"),
    "csr": (register("graph", torch.eye(2).to_sparse_csr()), r"conv\.graph: .*make it a dense tensor"),
    "quantized": (register("q", torch.ones(2).as_subclass(Wrapper)), r"conv\.q: .*a Wrapper; turn it into a plain"),
    "meta": (register("m", torch.ones(2, device="meta")), r"conv\.m: .*load the model's weights first"),
    "lazy": (lambda m: setattr(m, "lazy", nn.LazyConv1d(3, 1)), r"lazy\.weight: it is not initialised yet; run one"),
    "an old hook": (old_norm, r"fc: its weight is computed by a hook \(SpectralNorm\); .*remove_spectral_norm"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", REFUSED)
def test_state_that_no_file_gives_back_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    change, words = REFUSED[name]
    model = Net()
    change(model)
    with pytest.raises(ValueError, match=words):
        sparsify.save(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_an_averaged_model_says_what_to_save(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(sparsify.prune(sparsify.convert(Net().eval()), 0.5))
    sparsify.save(averaged, tmp_path / "model")
    sparsify.load(tmp_path / "model", torch.optim.swa_utils.AveragedModel(fresh()))
    with pytest.raises(CheckpointError, match="for another architecture"):
        sparsify.load(tmp_path / "model", fresh())


def test_two_layers_pruned_by_torch_are_two(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsify.convert(model)
    for layer in model:
        torch_prune.l1_unstructured(layer, "weight", 0.25)
    sparsify.save(model, tmp_path / "model")
    assert container.read(tmp_path / "model")[0].aliases == {}
    loaded = sparsify.load(tmp_path / "model", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    torch.testing.assert_close(loaded(X[:, :4]), model(X[:, :4]))


def test_a_plain_model_is_saved_without_a_word(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify.save(Net(), tmp_path / "model")

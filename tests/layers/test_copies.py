"""An average of a model's weights has the model's masks, or a warning says that it has not; other copies are silent."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsify
from sparsify import Pruner, Recipe, StaleMaskWarning, convert, export, prune, report, save, to_dense
from sparsify.layers.copies import stale


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


X = torch.linspace(-1, 1, 24).reshape(3, 8)


def average_floats(average: nn.Module, model: nn.Module) -> None:
    """As YOLO does: floating state."""
    new = model.state_dict()
    for key, value in average.state_dict().items():
        if value.dtype.is_floating_point:
            value.mul_(0.9).add_(new[key].detach(), alpha=0.1)


def average_all(average: nn.Module, model: nn.Module) -> None:
    """As timm's ModelEmaV2 does: all state, of which a bool mask becomes a float and a bool again."""
    for old, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        old.copy_(0.9 * old + 0.1 * new)


def average_parameters(average: nn.Module, model: nn.Module) -> None:
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 0.1)


def average_data(average: nn.Module, model: nn.Module) -> None:
    """Past the version counters."""
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.data.mul_(0.9).add_(new.data, alpha=0.1)


def floats_averaged_and_the_rest_copied(average: nn.Module, model: nn.Module) -> None:
    """As timm's ModelEmaV3 does."""
    for old, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        old.lerp_(new, 0.1) if old.is_floating_point() else old.copy_(new)


Update = Callable[[nn.Module, nn.Module], None]


def trained(average: nn.Module, model: nn.Module, update: Update) -> nn.Module:
    """Train a model to 75% of zeros, with an average of it."""
    schedule = {"kind": "linear", "end": 4, "every": 1}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(model, Recipe(groups=[{"sparsity": 0.75, "schedule": schedule}]), optimizer=optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        pruner.step()
        with torch.no_grad():
            update(average, model)
    pruner.finish()
    return average


@pytest.mark.parametrize("update", [average_floats, average_all, average_parameters, average_data])
def test_an_average_without_masks_is_noticed_wherever_it_goes(update: Update, tmp_path: Path) -> None:
    model = convert(mlp())
    average = trained(copy.deepcopy(model), model, update)
    why = "0: its weight was written since it was copied, and it keeps 72 weights that its original lost .and 1 more"
    for look in (
        report,
        lambda average: export(average, format="csr"),
        lambda average: export(average, format="csr", device="cpu"),
        lambda average: save(average, tmp_path / "average.safetensors"),
        lambda average: to_dense(copy.deepcopy(average)),
        lambda average: report(copy.deepcopy(average).half()),
    ):
        with pytest.warns(StaleMaskWarning, match=why) as caught:
            look(average)
        assert len(caught) == 1
    # As the warning says:
    masks = {key: value for key, value in model.state_dict().items() if value.dtype == torch.bool}
    average.load_state_dict(masks, strict=False)
    assert report(average).layers.sparsity == 0.75
    assert not average[0].weight[~model[0].mask].any()


def test_an_average_outlives_its_model() -> None:
    def train() -> nn.Module:
        model = convert(mlp())
        return trained(copy.deepcopy(model), model, average_parameters)

    with pytest.warns(StaleMaskWarning, match="keeps 72 weights"):
        report(train())


@pytest.mark.parametrize("update", [floats_averaged_and_the_rest_copied, None], ids=["copied", "swa_utils"])
def test_an_average_that_gets_the_masks_is_as_sparse_as_its_model(update: Update | None) -> None:
    model = convert(mlp())
    if update is None:
        wrapped = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        trained(wrapped, model, lambda average, model: average.update_parameters(model))
        average = wrapped.module
    else:
        average = trained(copy.deepcopy(model), model, update)
    fast = export(average, format="csr")
    assert report(fast).layers.sparsity == 0.75
    torch.testing.assert_close(fast(X), average(X))
    assert int((to_dense(average)[0].weight == 0).sum()) >= 72


def test_averages_of_state_dicts_keep_the_masks_and_no_bool_is_taken_for_a_number() -> None:
    one, other = prune(convert(mlp()), 0.5), prune(convert(mlp()), 0.5, method="random", seed=1)
    state = {
        key: torch.lerp(value, other.state_dict()[key], 0.5) if value.is_floating_point() else value
        for key, value in one.state_dict().items()
    }
    loaded = convert(mlp())
    loaded.load_state_dict(state)
    assert report(loaded).layers.sparsity == 0.5
    assert torch.equal(loaded[0].mask, one[0].mask)
    with pytest.raises(RuntimeError, match=r"0\.mask must be bool, got torch\.float32"):
        loaded.load_state_dict({key: value.float() for key, value in state.items()})


def test_a_mask_written_over_in_place_is_noticed_and_one_set_is_not() -> None:
    model = prune(convert(mlp()), 0.5)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.data.copy_(torch.ones_like(buffer))  # as Lightning copies an average back
    with pytest.warns(StaleMaskWarning, match="0: its mask was written over in place, and keeps 48 weights more than"):
        report(model)
    for layer in (model[0], model[2]):
        layer.set_mask(torch.ones_like(layer.mask))
    assert report(model).layers.sparsity == 0


def fine_tune(model: nn.Module) -> nn.Module:
    for _ in range(2):
        model(X).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
    return model


@pytest.mark.parametrize(
    "use",
    [
        lambda copied: copied,
        lambda copied: copied.half().float(),
        lambda copied: copy.deepcopy(copied).to(torch.float64),
        lambda copied: prune(fine_tune(copied), 0.625),
        lambda copied: pickle.loads(pickle.dumps(copied)),
        copy.copy,
    ],
    ids=["snapshot", "cast", "copy of a copy", "pruned by itself", "another process", "shallow"],
)
def test_other_copies_of_a_model_that_is_pruned_further_are_silent(use: Callable[[nn.Module], nn.Module]) -> None:
    model = prune(convert(mlp()), 0.5)
    copied = copy.deepcopy(model)
    prune(fine_tune(model), 0.75)
    assert report(use(copied)).layers.sparsity in (0.5, 0.625)
    assert report(model).layers.sparsity == 0.75


def test_a_copy_that_trains_under_masks_no_denser_than_its_original_is_silent() -> None:
    model = prune(convert(mlp()), 0.5)
    copied = fine_tune(copy.deepcopy(model))
    assert report(copied).layers.sparsity == 0.5
    prune(model, 0.25)
    assert report(copied).layers.sparsity == 0.5


def test_a_copy_is_as_the_layer_was() -> None:
    layer = sparsify.SparseLinear(8, 4, 0.5, seed=1)
    layer.role = "first"
    copied = copy.deepcopy([layer, layer])
    assert copied[0] is copied[1]
    assert copied[0].role == "first"
    assert torch.equal(copied[0](X), layer(X))
    assert isinstance(copied[0].mask, Tensor)
    assert copied[0].mask.data_ptr() != layer.mask.data_ptr()


def test_of_a_copy_of_a_copy_the_latest_original_with_new_masks_decides() -> None:
    original = nn.Sequential(sparsify.SparseLinear(8, 8, 0.5, seed=0))
    first = copy.deepcopy(original)
    with torch.no_grad():
        first[0].weight.add_(0.1)
    second = copy.deepcopy(first)
    first[0].set_mask(torch.ones(8, 8, dtype=torch.bool))  # more than the original keeps, and on purpose
    with torch.no_grad():
        second[0].mask.copy_(first[0].mask)  # as an average takes the buffers of its model
        second[0].weight.add_(0.1)
    assert stale(second[0]) == ""
    first[0].sparse_update(0.75)
    assert "its original lost" in stale(second[0])

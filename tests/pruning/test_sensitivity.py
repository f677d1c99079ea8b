"""Each layer's damage is what pruning it alone does, and the allocation is the best there is."""

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify.conversion.convert import sparse_layers
from sparsify.pruning.sensitivity import Sensitivity, measure_sensitivity, plot_sensitivity

DATA = [torch.randn(20, 12, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return sparsify.convert(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_damage_is_that_of_the_layer_alone(model: nn.Module, method: str) -> None:
    before = copy.deepcopy(model.state_dict())
    measured = measure_sensitivity(model, DATA, sparsities=(0.25, 0.75), method=method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(measured.damage) == ["0", "2", "4"]
    with torch.no_grad():
        dense = torch.cat([model(x) for x in DATA])
        for name, (i, sparsity) in itertools.product(sparse_layers(model), enumerate((0.25, 0.75))):
            one = copy.deepcopy(model)
            sparsify.prune(one, sparsity, method=method, data=DATA, include=name)
            change = torch.cat([one(x) for x in DATA]) - dense
            expected = float(change.square().sum() / (dense - dense.mean(0)).square().sum())
            assert measured.damage[name][i] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_allocation_is_the_best_of_all() -> None:
    """Compared with every choice of measured points that meets the budget."""
    damage = {"a": (0.1, 0.3, 0.9), "b": (0.0, 0.05, 0.2), "c": (0.2, 0.5, 3.0)}  # each ever steeper
    measured = Sensitivity((0.25, 0.5, 0.75), damage, dict.fromkeys(damage, 100))
    targets = measured.allocate(0.5)
    assert sum(round(100 * s) for s in targets.values()) == 150
    points = {name: [(0.0, 0.0), *zip(measured.sparsities, d, strict=True)] for name, d in damage.items()}
    best = min(
        sum(d for _, d in choice) for choice in itertools.product(*points.values()) if sum(s for s, _ in choice) == 1.5
    )
    assert sum(dict(points[name])[round(s, 6)] for name, s in targets.items()) == pytest.approx(best)


def test_no_layer_goes_beyond_the_cap() -> None:
    measured = Sensitivity((0.5, 0.9), {"a": (1.0, 9.0), "b": (0.0, 0.0)}, {"a": 10, "b": 1000})
    assert measured.allocate(0.8)["b"] <= 0.9
    assert measured.allocate(0.6, max_sparsity=0.6) == {"a": 0.6, "b": 0.6}
    with pytest.raises(ValueError, match="leaves no room for sparsity"):
        measured.allocate(0.95)


@pytest.mark.parametrize("sparsities", [(), (0.0, 0.5), (0.5, 0.5), (0.7, 0.5), (0.5, 1.0)])
def test_sparsities_that_do_not_rise_are_refused(model: nn.Module, sparsities: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must rise between 0 and 1"):
        measure_sensitivity(model, DATA, sparsities=sparsities)


@pytest.mark.parametrize("names", [("a", "b"), ("encoder.layers.encoder_layer_10.self_attention.out_proj", "")])
def test_the_picture_is_drawn(tmp_path: Path, names: tuple[str, str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install matplotlib")
    damage = dict(zip(names, [(0.1, 0.2), (0.0, 0.3)], strict=True))
    plot_sensitivity(Sensitivity((0.5, 0.9), damage, dict.fromkeys(names, 4)), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_many_layers_marks_their_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")  # scripts that draw set another one
    names = [f"layers.{i}.proj" for i in range(210)]
    damage = {name: (1e-4 * (i + 1), 1e-3 * (i + 1)) for i, name in enumerate(names)} | {names[7]: (0.0, 0.0)}
    measured = Sensitivity((0.5, 0.9), damage, dict.fromkeys(names, 100))
    plot_sensitivity(measured, tmp_path / "a.svg", targets=measured.allocate(0.7), title="hf:FOLDER, wanda")
    text = (tmp_path / "a.svg").read_text()
    for said in ("layers.209.proj  0.5%", "Damage of 210 layers", "hf:FOLDER, wanda", "target"):
        assert f"<!-- {said}" in text
    ticks = [int(n) for n in re.findall(r"<!-- \u2212?(\d+)(?:\.\d+)? -->", text)]
    assert max(ticks) <= 4  # a layer without damage does not stretch the scale down to 1e-12


def test_outputs_that_are_no_numbers(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="output on batch 1 of the calibration data holds NaN or Inf"):
        measure_sensitivity(model, [DATA[0], DATA[1] * torch.nan], sparsities=(0.5,))

    def grows(weight: torch.Tensor) -> torch.Tensor:
        model[4].bias.data.fill_(torch.inf)
        return weight

    with pytest.raises(ValueError, match=r"^0: pruned alone, it makes the model's output NaN or Inf"):
        measure_sensitivity(model, DATA, sparsities=(0.5,), method=grows)

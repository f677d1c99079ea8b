"""inspect of a model: what convert would do with it, why not, and what each layer is worth."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import convert, inspect, prune
from sparsify.cli import main


class Net(nn.Module):
    """A convolution, an attention, two Linears, one of them tied to an Embedding, and one that cannot convert."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 16)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        return self.head(self.normed(torch.relu(self.fc(x))))


IDS = torch.zeros(2, 5, dtype=torch.long)  # 10 rows


def test_every_part_with_its_share_of_parameters_and_multiply_adds() -> None:
    model = Net()
    before = {name: type(module) for name, module in model.named_modules()}
    found = inspect(model, IDS)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.training
    parts = {part.name: part for part in found}
    assert [name for name, part in parts.items() if part.becomes] == ["attention.in_proj", "attention.out_proj", "fc"]
    assert parts["fc"].becomes == "SparseLinear"
    assert parts["fc"].shape == (16, 8)
    assert "parametrized" in parts["normed"].reason
    assert "embedding.weight and head.weight are one Parameter" in parts["head"].reason
    assert "not of the types that convert" in parts["1 x Conv1d"].reason
    sizes = {name: (part.n_parameters, part.n_multiply_adds) for name, part in parts.items()}
    assert sizes["fc"] == (8 * 16 + 16, 10 * 8 * 16)
    assert sizes["attention.in_proj"][1] == 10 * 8 * 24
    assert sizes["attention.out_proj"][1] == 10 * 8 * 8
    assert sizes["head"] == (80, 10 * 80)
    assert sizes["1 x Conv1d"] == (8 * 8 * 3 + 8, 10 * 8 * 8 * 3)
    assert found.n_parameters == sum(p.numel() for p in model.parameters()) == sum(n for n, _ in sizes.values())
    products = 2 * 2 * 2 * 5 * 5 * 4  # batch x heads x (QK and AV) x 5 x 5 x head size
    assert found.n_multiply_adds == 10 * (128 + 128 + 64 * 3 + 192 + 64 + 80) + products
    share = found.share()
    assert share[0] == pytest.approx((24 * 8 + 64 + 144) / found.n_parameters, abs=0.1)
    assert 0 < share[1] < 1


def test_it_says_what_convert_does() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    found = inspect(model, include="0")
    assert [part.name for part in found if part.becomes] == ["0"]
    assert found.n_multiply_adds is None
    assert [n for n, m in convert(model, include="0").named_modules() if isinstance(m, sparsify.SparseLinear)] == ["0"]
    again = inspect(prune(model, 0.5), torch.zeros(3, 8))
    assert [(part.name, part.becomes) for part in again if part.becomes] == [
        ("0", "already masked"),
        ("2", "SparseLinear"),
    ]
    assert [part.n_multiply_adds for part in again if part.becomes] == [3 * 64, 3 * 32]
    with pytest.raises(ValueError, match="matches no layer"):
        inspect(model, include="5")


def test_a_table_for_people() -> None:
    text = str(inspect(Net(), IDS))
    lines = text.splitlines()
    assert lines[0].startswith("convert takes layers with")
    assert "multiply-adds" in lines[0]
    assert lines[2].split() == ["layer", "type", "shape", "parameters", "multiply-adds", "becomes"]
    assert any(line.startswith("fc ") and line.endswith("SparseLinear") for line in lines)
    assert "stays dense: its weight is tied" in text
    root = inspect(nn.Linear(4, 4))
    assert root.share() == (1.0, None)
    assert "(root)" in str(root)


def test_on_the_meta_device_nothing_is_computed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        found = inspect(model, torch.zeros(3, 8))
    assert [part.n_multiply_adds for part in found] == [3 * 128, 3 * 64]


def test_functional_parameters_are_parts_too() -> None:
    class Multiplies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    found = inspect(Multiplies(), torch.zeros(3, 8), functional=True)
    assert [(part.name, part.shape, part.n_multiply_adds) for part in found] == [("weight_layer", (4, 8), 96)]


def test_a_file_is_listed_as_before(tmp_path: Path) -> None:
    sparsify.save(prune(convert(nn.Sequential(nn.Linear(8, 8))), 0.5), tmp_path / "m.safetensors")
    assert inspect(tmp_path / "m.safetensors")[0].sparsity == 0.5
    assert inspect(str(tmp_path / "m.safetensors"))[0].sparsity == 0.5
    with pytest.raises(ValueError, match="has no effect with a file"):
        inspect(tmp_path / "m.safetensors", IDS)  # type: ignore[call-overload]


def test_the_command_takes_a_model_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{__name__}:Net"]) == 0
    assert "convert takes layers with" in capsys.readouterr().out
    assert main(["inspect", f"{__name__}:Net", "--run", "--seq", "5", "--json"]) == 0
    parts = {part["name"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    assert parts["fc"]["n_multiply_adds"] == 5 * 8 * 16
    assert main(["inspect", f"{__name__}:Net", "--seq", "5"]) == 2
    assert "no effect without --run" in capsys.readouterr().err

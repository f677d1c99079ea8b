"""`compress` is convert, prune and export in one call; layers are chosen by functions and by types too."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify import Recipe, compress, convert, export, prune, report
from sparsify.cli import main
from sparsify.recipes.assignment import assign_layers


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


DATA = [torch.randn(24, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
X = DATA[0]


def test_it_is_convert_prune_and_export() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    fast = compress(model, 0.75, format="csr", exclude="4")
    by_hand = export(prune(convert(net(), exclude="4"), 0.75), format="csr")
    assert torch.equal(fast(X), by_hand(X))
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not fast.training
    assert model.training
    in_place = compress(model, 0.75, format="csr", exclude="4", copy=False)
    assert torch.equal(in_place(X), fast(X))
    assert in_place is not None
    assert not model.training


def test_with_data_it_uses_the_data_and_a_batch_as_example() -> None:
    fast = compress(net(), 0.5, data=iter(DATA), format="csr")
    by_hand = export(prune(convert(net()), 0.5, method="sparsegpt", data=DATA), format="csr")
    assert torch.equal(fast(X), by_hand(X))
    assert all(row.error is not None for row in report(fast))
    measured = compress(net(), 0.5, data=DATA, method="wanda")
    assert {layer.choice.tokens for layer in measured if hasattr(layer, "choice")} <= {24}
    assert compress(net(), 0.5, data=DATA, example=X[:3], method="wanda")(X).shape == (24, 4)


def test_with_a_recipe() -> None:
    recipe = Recipe(groups=[{"layers": ["0"], "sparsity": 0.5}, {"layers": ["2"], "pattern": "2:4"}])
    fast = compress(net(), recipe=recipe, format="csr")
    assert [row.sparsity for row in report(fast)][:2] == [0.5, 0.5]
    assert type(fast[4]) is nn.Linear
    trained = sparsify.load_recipe("gradual-magnitude-90")
    for options, message in (
        ({"recipe": recipe, "sparsity": 0.5}, "'sparsity' has no effect beside a recipe"),
        ({"recipe": recipe, "refit": True}, "'refit' has no effect beside a recipe"),
        ({"recipe": trained}, "is followed while training; use sparsify.Pruner"),
        ({"recipe": Recipe(groups=[{"layers": ["x.*"], "sparsity": 0.5}])}, "'x.*' matches no layer"),
        ({}, "sparsity"),
        ({"sparsity": 0.5, "method": "sparsegpt"}, "'sparsegpt' needs"),
        ({"sparsity": 0.5, "format": "csrr"}, "format 'csrr' is none of"),
        ({"sparsity": 0.5, "data": X}, r"data is one Tensor; give the batches in a list: data=\[batch\]"),
    ):
        model = net()
        with pytest.raises(ValueError, match=message):
            compress(model, **options)
        assert type(model[0]) is nn.Linear
    for made in (convert(net()), compress(net(), 0.5, format="csr")):
        with pytest.raises(ValueError, match=r"already (exported|converted)"):
            compress(made, 0.5)


@pytest.mark.parametrize("choice", [None, True, False])
def test_a_recovery_compares_logits_as_the_recipe_says(choice: bool | None, one_thread: None) -> None:
    """The outputs of this model are logits only if the recipe says so."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)), [torch.randn(8, 12)]
    stage = {"steps": 3} if choice is None else {"steps": 3, "logits": choice}
    recipe = Recipe(groups=[{"sparsity": 0.5}], recover=stage)
    found, expected = (convert(copy.deepcopy(model)) for _ in range(2))
    teacher = copy.deepcopy(expected)
    sparsify.apply(found, recipe, data=data)
    sparsify.recover(prune(expected, 0.5), teacher, data, steps=3, logits=choice)
    other = convert(copy.deepcopy(model))
    sparsify.recover(prune(other, 0.5), teacher, data, steps=3, logits=not choice)
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    assert not torch.equal(found[0].weight, other[0].weight)


def test_layers_are_chosen_by_a_function_of_name_and_module() -> None:
    def square(name: str, module: nn.Module) -> bool:
        return module.in_features == module.out_features

    model = convert(net(), include=square)
    assert [type(layer).__name__ for layer in model[::2]] == ["Linear", "SparseLinear", "Linear"]
    model = convert(net(), exclude=[lambda name, _: name == "0", "4"])
    assert [type(layer).__name__ for layer in model[::2]] == ["Linear", "SparseLinear", "Linear"]
    prune(model, 0.5, include=square)
    assert model[2].sparsity == 0.5
    with pytest.raises(ValueError, match="<lambda> chose none of the 3 layers"):
        convert(net(), include=lambda name, module: False)
    with pytest.raises(TypeError, match=r"must return True or False, got None"):
        convert(net(), include=lambda name, module: None)
    with pytest.raises(TypeError, match=r"a function \(name, module\) -> bool selects layers, got 3"):
        convert(net(), include=3)


def test_types_in_a_recipe_and_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(
        groups=[{"types": ["Conv2d"], "sparsity": 0.5}, {"types": ["Linear"], "layers": ["*"], "sparsity": 0.75}]
    )
    fast = compress(convnet(), recipe=recipe, format="csr")
    assert [(row.name, row.sparsity) for row in report(fast)] == [("0", 0.5), ("4", 0.75)]
    assert [list(weights) for weights in assign_layers(recipe, convnet())] == [["0"], ["4"]]
    with pytest.raises(
        ValueError, match=r"groups.0: types: 'Conv' is none of the types that convert: Linear, Conv1d, Conv2d"
    ):
        assign_layers(Recipe(groups=[{"types": ["Conv"], "sparsity": 0.5}]), convnet())
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    heads = Recipe(groups=[{"types": ["MultiheadAttention"], "sparsity": 0.5}])
    converted = convert(copy.deepcopy(attention))
    assert [list(w) for w in assign_layers(heads, attention)] == [list(w) for w in assign_layers(heads, converted)]
    assert set(assign_layers(heads, attention)[0]) == {"self_attn.in_proj", "self_attn.out_proj"}

    (tmp_path / "own_convnet.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    common = [
        "compress",
        "--model",
        "own_convnet:build",
        "--sparsity",
        "0.5",
        "--format",
        "csr",
        "--out",
        "a.safetensors",
    ]
    assert main([*common, "--types", "Linear,Conv2d"]) == 0
    assert {row.name for row in sparsify.inspect("a.safetensors")} == {"0", "1"}
    assert main([*common, "--types", "Softmax"]) == 2
    assert "types: 'Softmax' is none of the types that convert" in capsys.readouterr().err

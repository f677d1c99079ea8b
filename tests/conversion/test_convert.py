"""convert changes the layers of a model and nothing else: outputs, parameters, hooks and flags stay."""

import copy

import pytest
import torch
from cases import DTYPES
from converted_models import Attention, X, assert_unchanged, mlp, snapshot
from torch import nn

from sparsify import SparseLinear, convert, masks_from_zeros, prune, to_dense
from sparsify.conversion.convert import plan_convert


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_stay_bit_for_bit_and_parameters_stay_the_same_objects(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    x = X.to(dtype)
    expected, parameters = model(x), dict(model.named_parameters())
    assert convert(model) is model
    assert torch.equal(model(x), expected)
    assert [type(layer) for layer in model] == [SparseLinear, nn.ReLU, SparseLinear]
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert model[2].bias is None
    assert all(layer.mask.all() for layer in (model[0], model[2]))


def test_flags_stay() -> None:
    model = mlp()
    model[0].eval()
    model[2].weight.requires_grad_(False)
    convert(model)
    assert [model.training, model[0].training, model[2].training] == [True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]
    prune(model, 0.5)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]


def test_every_kind_of_hook_stays() -> None:
    model, calls = mlp(), []
    layer = model[2]
    handle = layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("forward_pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    layer.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    layer.weight.register_hook(lambda grad: calls.append("grad"))
    convert(model)
    model(X).sum().backward()
    model.load_state_dict(model.state_dict())
    assert sorted(calls) == ["backward", "forward", "forward_pre", "grad", "load", "state_dict"]
    handle.remove()
    calls.clear()
    model(X)
    assert calls == ["forward_pre"]


def test_an_attribute_put_on_a_layer_stays() -> None:
    model = mlp()
    model[0].role = "first"
    convert(model)
    assert model[0].role == "first"
    to_dense(model)
    assert model[0].role == "first"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_built_earlier_goes_on(optimizer: type[torch.optim.Optimizer]) -> None:
    model, twin = mlp(), mlp()
    steps = []
    for net in (model, twin):
        built_early = optimizer(net.parameters(), lr=0.1)
        net(X).square().sum().backward()
        built_early.step()
        steps.append(built_early)
    convert(model)
    for net, built_early in zip((model, twin), steps, strict=True):
        built_early.zero_grad()
        net(X).square().sum().backward()
        built_early.step()
    assert torch.equal(model(X), twin(X))


def test_a_root_that_is_a_linear() -> None:
    linear = nn.Linear(8, 4)
    expected = linear(X)
    layer = convert(linear)
    assert isinstance(layer, SparseLinear)
    assert torch.equal(layer(X), expected)
    assert prune(layer, 0.5).sparsity == 0.5
    dense = to_dense(layer)
    assert type(dense) is nn.Linear
    assert int((dense.weight == 0).sum()) == 16


def test_a_module_used_twice_stays_one() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(4, 4)})
    convert(model)
    assert isinstance(model["a"], SparseLinear)
    assert model["a"] is model["b"][0]
    prune(model, 0.5, include="b.0")
    assert model["a"].sparsity == 0.5
    assert model["c"].sparsity == 0
    to_dense(model)
    assert model["a"] is model["b"][0]


def test_a_reference_from_outside_sees_the_converted_layer() -> None:
    model = mlp()
    outside = model[0]
    convert(model)
    assert outside is model[0]
    assert isinstance(outside, SparseLinear)


def test_converting_again_changes_nothing() -> None:
    model = prune(convert(mlp()), 0.5)
    before = snapshot(model)
    convert(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("include", "exclude", "converted"),
    [("0", None, [0]), (None, "0", [2]), ("re:[02]", None, [0, 2]), (nn.Linear, ["2"], [0])],
)
def test_include_and_exclude(include: object, exclude: object, converted: list[int]) -> None:
    model = convert(mlp(), include=include, exclude=exclude)  # type: ignore[arg-type]
    assert [i for i, layer in enumerate(model) if isinstance(layer, SparseLinear)] == converted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "fc"}, "'fc' matches no layer; near names: '0', '2'"),
        ({"exclude": ["2", "3"]}, "'3' matches no layer; near names"),
        ({"include": nn.Conv2d}, "type Conv2d matches no layer; the model has: Linear, ReLU, Sequential"),
        ({"include": "0", "exclude": "0"}, "leave no layer"),
    ],
)
def test_a_selector_that_matches_nothing_changes_nothing(options: dict, message: str) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        convert(model, **options)
    assert_unchanged(model, before)


def test_types_choose_the_kinds_of_modules() -> None:
    assert isinstance(convert(mlp(), types=nn.Linear)[0], SparseLinear)
    assert isinstance(convert(mlp(), types=[nn.Linear])[2], SparseLinear)
    for types, message in (
        (nn.ReLU, "types: ReLU is none of the types that convert: Linear"),
        ([], "types is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(mlp(), types=types)


def test_a_model_without_linears_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no layer that can be converted \(of the types nn\.Linear"):
        convert(nn.Sequential(nn.LSTM(1, 1)))


def test_a_model_on_the_meta_device_converts_and_loads_later() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4, bias=False))
    convert(model)
    assert model[0].weight.is_meta
    with pytest.raises(ValueError, match="0: the weight is on the meta device"):
        prune(model, 0.5)
    with pytest.raises(ValueError, match="0: the weight is on the meta device"):
        masks_from_zeros(model)
    dense = mlp()
    model.load_state_dict(dense.state_dict(), assign=True)
    assert torch.equal(model(X), dense(X))
    assert prune(model, 0.5)[0].sparsity == 0.5


def test_a_deep_copy_is_independent() -> None:
    model = prune(convert(mlp()), 0.5)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    prune(twin, 0.9)
    assert model[0].sparsity == 0.5


def test_a_dense_state_dict_loads_into_a_converted_model() -> None:
    dense = mlp()
    with torch.no_grad():
        dense[0].weight.add_(1)
    model = convert(mlp())
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model(X), dense(X))


def test_a_wrapped_model_converts() -> None:
    model = convert(nn.DataParallel(mlp()))
    assert isinstance(model.module[0], SparseLinear)
    assert torch.equal(model(X), mlp()(X))


def test_plan_convert_touches_nothing() -> None:
    model = Attention()
    before = snapshot(model)
    plan = plan_convert(model)
    assert (list(plan.swap), list(plan.left), plan.already) == (["fc"], ["attention"], ())
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["swin_t", "convnext_tiny", "mobilenet_v3_large", "resnet50"])
def test_torchvision_models_stay_bit_identical(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        convert(model, types=nn.Linear)  # of some it is the smaller part
        assert torch.equal(model(x), expected)
    assert any(isinstance(module, SparseLinear) for module in model.modules())
    assert not any(type(module) is nn.Linear for module in model.modules())

"""convert changes the layers of a model and nothing else; what it cannot convert it says."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from cases import DTYPES
from torch import Tensor, nn

import sparsify
from sparsify import LeftDenseWarning, SparseLinear, convert, masks_from_zeros, prune, to_dense
from sparsify.conversion.convert import plan_convert


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4, bias=False))


X = torch.linspace(-1, 1, 24).reshape(3, 8)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Return all that must not change when a call fails."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    return {"types": [(name, type(m)) for name, m in model.named_modules()], "tensors": tensors}


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    now = snapshot(model)
    assert now["types"] == before["types"]
    torch.testing.assert_close(now["tensors"], before["tensors"], rtol=0, atol=0, equal_nan=True)


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
        convert(nn.Sequential(nn.Conv2d(1, 1, 1)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_weight_is_an_error_that_names_both_and_the_way_out() -> None:
    model = Tied()
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"head: its weight is tied: embedding\.weight and head\.weight .*"
        r"exclude=\['head'\] or tied='skip', .* tied='share', or untie",
    ):
        convert(model)
    assert_unchanged(model, before)
    convert(model, exclude=["head"])  # the way out
    assert isinstance(model.fc, SparseLinear)
    assert model.head.weight is model.embedding.weight


def test_two_tied_linears_and_tied_memory_are_errors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0: its weight is tied: 0\.weight and 1\.weight are one Parameter"):
        convert(model)
    model[1].weight = nn.Parameter(model[0].weight.detach())  # another object over the same memory
    with pytest.raises(ValueError, match="its weight is tied"):
        convert(model)
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    convert(model)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def patched() -> nn.Linear:
    layer = nn.Linear(8, 4)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: Doubled(8, 4),
            r"it is a Doubled, a subclass of nn\.Linear with its own forward, which may",
        ),
        (patched, "its forward was replaced on the instance"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), "it is parametrized; fold that"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 4)), "it is parametrized; fold that"),
        (lambda: nn.utils.spectral_norm(nn.Linear(8, 4)), "its weight is computed by a hook"),
        (lambda: nn.utils.prune.l1_unstructured(nn.Linear(8, 4), "bias", 0.5), "its bias is pruned too"),
    ],
    ids=["subclass", "forward", "weight_norm", "orthogonal", "spectral_norm", "bias"],
)
def test_what_cannot_be_converted_stays_dense_with_its_reason(make, why: str) -> None:  # type: ignore[no-untyped-def]
    odd = make()
    model = nn.ModuleDict({"odd": odd, "fc": nn.Linear(8, 4)})
    kind = type(odd)
    with pytest.warns(LeftDenseWarning, match=rf"odd \({why}") as caught:
        convert(model)
    assert len(caught) == 1
    assert type(model["odd"]) is kind
    assert isinstance(model["fc"], SparseLinear)
    before = snapshot(model["fc"])
    with pytest.raises(ValueError, match=f"odd: cannot be converted, {why}"):
        convert(model, include="odd")  # asked for by name, it is an error
    with pytest.raises(ValueError, match=why):
        convert(nn.Sequential(make()))
    assert_unchanged(model["fc"], before)


def test_a_lazy_linear_is_an_error_before_it_is_initialised_and_a_linear_after() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    for options in ({}, {"include": "0"}):
        with pytest.raises(ValueError, match=r"0: it is not initialised yet; run one batch .*exclude=\['0'\]"):
            convert(lazy, **options)
    assert type(convert(copy.deepcopy(lazy), exclude="0")[1]) is SparseLinear
    lazy(X)
    assert isinstance(convert(lazy)[0], SparseLinear)


class OwnAttention(nn.MultiheadAttention):
    """A subclass, of which nobody knows what it computes."""


class Attention(nn.Module):
    def __init__(self, kind: type[nn.MultiheadAttention] = OwnAttention) -> None:
        super().__init__()
        self.attention, self.fc = kind(8, 2, batch_first=True), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0])


def share(part: nn.Module, whole: nn.Module) -> str:
    return f"{sum(p.numel() for p in part.parameters()) / sum(p.numel() for p in whole.parameters()):.1%}"


def test_an_unknown_attention_stays_dense_with_one_notice_of_its_share() -> None:
    model = Attention().eval()
    x = X.reshape(1, 3, 8)
    expected = model(x)
    with pytest.warns(LeftDenseWarning) as caught:
        convert(model)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "attention (it is a OwnAttention, a subclass of nn.MultiheadAttention that may compute" in message
    assert f" {share(model.attention, model)} of the parameters" in message
    assert caught[0].filename == __file__  # points at the call
    assert torch.equal(model(x), expected)
    assert isinstance(model.fc, SparseLinear)
    with pytest.raises(ValueError, match="attention: cannot be converted, it is a OwnAttention"):
        convert(Attention(), include=nn.MultiheadAttention)


def test_attention_that_is_not_among_the_types_keeps_its_weights() -> None:
    with pytest.warns(LeftDenseWarning, match=r"attention\.out_proj \(MultiheadAttention reads its weight directly\)"):
        model = convert(Attention(nn.MultiheadAttention), types=nn.Linear)
    assert type(model.attention) is nn.MultiheadAttention
    assert isinstance(model.fc, SparseLinear)


def test_the_linears_beside_an_unknown_attention_stay_dense_too() -> None:
    """In inference nn.TransformerEncoderLayer reads their weights, and nothing can keep it from that."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.self_attn = OwnAttention(8, 2, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 8)).eval()
    x = X.reshape(1, 3, 8)
    expected = model(x)
    with pytest.warns(LeftDenseWarning, match="3 layers stay dense") as caught:
        convert(model)
    linears = nn.ModuleList((layer.self_attn, layer.linear1, layer.linear2))
    assert f" {share(linears, model)} of the parameters" in str(caught[0].message)
    assert "linear2 (TransformerEncoderLayer reads its weight directly)" in str(caught[0].message)
    assert torch.equal(model(x), expected)
    assert isinstance(model[1], SparseLinear)


def test_the_share_counts_only_what_stays_dense_unasked() -> None:
    model = nn.ModuleDict({"one": Attention(), "other": Attention()})
    with pytest.warns(LeftDenseWarning) as caught:
        convert(model, exclude="other.attention.*")
    assert f" {share(model['one'].attention, model)} of the parameters" in str(caught[0].message)


def test_a_notice_turned_into_an_error_comes_before_any_change() -> None:
    model = Attention()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LeftDenseWarning):
            convert(model)
    assert_unchanged(model, before)


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


def test_to_dense_is_plain_torch_with_zeros() -> None:
    model = prune(convert(mlp()), 0.75)
    parameters = dict(model.named_parameters())
    expected = model(X)
    assert to_dense(model) is model
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(model(X), expected)
    assert int((model[0].weight == 0).sum()) == 72
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_to_dense_unpacks_an_exported_model() -> None:
    model = prune(convert(mlp()), 0.75)
    fast = sparsify.export(model, format="csr")
    expected = model(X)
    to_dense(fast)
    assert [type(layer) for layer in fast] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(fast(X), expected)
    assert isinstance(model[0], SparseLinear)


def test_masks_from_zeros() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].weight[5, 2] = -0.0
    expected = model(X)
    masks_from_zeros(convert(model))
    assert model[0].sparsity == 9 / 96
    assert not model[0].mask[3].any()
    assert model[2].sparsity == 0
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match=r"the model has no SparseLinear; call sparsify\.convert"):
        masks_from_zeros(mlp())


def test_masks_from_zeros_of_chosen_layers() -> None:
    model = convert(mlp())
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[0] = 0
    masks_from_zeros(model, exclude="0")
    assert [model[0].sparsity, model[2].sparsity] == [0, 0.25]
    with pytest.raises(ValueError, match="matches no layer"):
        masks_from_zeros(model, include="1")


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


def test_weights_that_overlap_in_memory_are_tied_too() -> None:
    whole = torch.randn(8, 4)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[0].weight = nn.Parameter(whole)
    net[1].weight = nn.Parameter(whole[4:])
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one Parameter"):
        convert(net)
    net[0] = nn.Linear(4, 4, bias=False)
    net[0].weight = nn.Parameter(whole[:4])  # beside each other in one memory: not tied
    assert type(convert(net)[1]) is SparseLinear


def offloaded() -> nn.Linear:
    """A layer under a hook of accelerate's, as device_map and offloading leave it."""
    accelerate = pytest.importorskip("accelerate")
    layer = nn.Linear(8, 4)
    accelerate.cpu_offload(layer, execution_device="cpu")
    return layer


class AsIs(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


class Named(nn.Linear):
    """Adds nothing."""


def parametrized(layer: nn.Module, key: str = "weight") -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, key, AsIs())
    return layer


def with_parametrized_out_proj() -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(8, 2)
    parametrized(attention.out_proj)
    return attention


FOLD = r"it is parametrized; fold that first, .*remove_parametrizations\(layer, "


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: parametrized(nn.Linear(8, 4), "bias"), FOLD + "'bias'"),
        (lambda: parametrized(Named(8, 4)), FOLD + "'weight'"),
        (lambda: parametrized(nn.Conv2d(8, 4, 1)), FOLD + "'weight'"),
        (lambda: parametrized(nn.MultiheadAttention(8, 2), "in_proj_weight"), FOLD + "'in_proj_weight'"),
        (with_parametrized_out_proj, "its out_proj cannot: " + FOLD + "'weight'"),
        (offloaded, r"accelerate has put a hook on it .*remove_hook_from_module\(model, recurse=True\)"),
    ],
    ids=["bias", "subclass", "convolution", "attention", "out_proj", "accelerate"],
)
def test_a_reason_names_what_was_done_to_the_layer_and_no_class_of_torchs_own(
    make: Callable[[], nn.Module], why: str
) -> None:
    odd = make()
    with pytest.raises(ValueError, match=f"odd.*: {why}") as error:
        convert(nn.ModuleDict({"odd": odd}), types=[nn.Linear, nn.Conv2d, nn.MultiheadAttention])
    assert "Parametrized" not in str(error.value)


def test_accelerates_hooks_come_off_as_the_reason_says() -> None:
    accelerate = pytest.importorskip("accelerate")
    layer = offloaded()
    accelerate.hooks.remove_hook_from_module(layer, recurse=True)
    assert isinstance(prune(convert(layer), 1.0), SparseLinear)
    assert torch.equal(layer(X), layer.bias.expand(3, 4))  # its own forward runs, not that of nn.Linear


def pruned_by_torch(layer: nn.Module) -> nn.Module:
    return nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (parametrized, "it is parametrized; fold that first"),
        (lambda layer: parametrized(layer, "bias"), "it is parametrized; fold that first"),
        (nn.utils.parametrizations.spectral_norm, "it is parametrized; fold that first"),
        (nn.utils.spectral_norm, "its weight is computed by a hook"),
        (pruned_by_torch, "torch has put a mask of its own on its weight; make that permanent"),
    ],
    ids=["parametrized", "bias", "spectral_norm", "old spectral_norm", "torch.nn.utils.prune"],
)
@pytest.mark.parametrize("verb", [lambda model: sparsify.export(model, format="csr"), to_dense])
def test_a_layer_that_torch_changed_after_convert_is_named_with_the_way_out(
    change: Callable[[nn.Module], nn.Module], why: str, verb: Callable[[nn.Module], nn.Module]
) -> None:
    model = convert(mlp())
    change(model[0])
    prune(model, 0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"0: {why}") as error:
        verb(model)
    assert "gather" not in str(error.value)
    assert_unchanged(model, before)

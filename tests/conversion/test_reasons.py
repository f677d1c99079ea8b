"""A module left dense by convert is named with its reason and the way out; asked for by name, it is an error."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from converted_models import Attention, OwnAttention, X, assert_unchanged, mlp, snapshot
from torch import Tensor, nn

import sparsify
from sparsify import LeftDenseWarning, SparseLinear, convert, prune, to_dense


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

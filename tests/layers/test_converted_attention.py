"""Attention in and out of convert: projections that are layers, pruned, trained, exported, saved and loaded."""

import copy
import pickle
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_inputs import (
    EMBED,
    HEADS,
    INPUTS_ONLY,
    SHARING,
    TOLERANCE,
    X,
    build,
    inputs,
    results,
)
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsify
from sparsify import CSRLinear, LeftDenseWarning, SparseLinear
from sparsify.kernels import FORMS, supports
from sparsify.recipes.dry_run import plan

pytestmark = pytest.mark.usefixtures("one_thread")


def flow(options: dict[str, Any], sparsity: float = 0.5) -> tuple[nn.MultiheadAttention, nn.Module]:
    """Return a dense attention, and one that was the same until it was converted and pruned."""
    dense = build(**options)
    return dense, sparsify.prune(sparsify.convert(nn.Sequential(copy.deepcopy(dense))), sparsity)[0]


PACKED, SEPARATE = {"batch_first": True}, {"batch_first": True, "kdim": 4, "vdim": 5}
KINDS = [PACKED, SEPARATE, {**PACKED, "bias": False}, {**PACKED, "add_bias_kv": True}, {**SEPARATE, "bias": False}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_convert_keeps_the_parameters_and_to_dense_brings_all_back(options: dict[str, Any]) -> None:
    attention = build(**options)
    model = nn.Sequential(attention)
    before, out_proj = model.state_dict(keep_vars=True), attention.out_proj
    calls: list[str] = []
    attention.register_forward_hook(lambda *_: calls.append("attention"))
    out_proj.register_forward_hook(lambda *_: calls.append("out_proj"))
    assert sparsify.convert(model)[0] is attention
    assert isinstance(attention, nn.MultiheadAttention)
    names = ("in_proj", "out_proj") if "kdim" not in options else ("q_proj", "k_proj", "v_proj", "out_proj")
    assert [name for name, _ in attention.named_children()] == list(names)
    assert all(isinstance(child, SparseLinear) for child in attention.children())
    assert {id(p) for p in model.parameters()} == {id(p) for p in before.values()}
    for key, parameter in before.items():
        assert attrgetter(key.removeprefix("0."))(attention) is parameter
    (query, key, value), *_ = inputs(attention, "none", "batch first")
    attention(query, key, value)
    assert calls == ["out_proj", "attention"]
    assert attention.out_proj is out_proj
    sparsify.to_dense(model)
    assert type(attention) is nn.MultiheadAttention
    assert type(out_proj) is type(build().out_proj)
    assert attention.out_proj is out_proj
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is parameter for key, parameter in before.items())
    assert set(vars(attention)) == set(vars(build(**options)))
    assert attention._qkv_same_embed_dim == ("kdim" not in options)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_dense_state_dict_loads_and_comes_back_out(options: dict[str, Any]) -> None:
    _, pruned = flow(options)
    other = build(seed=1, **options)
    model = nn.Sequential(pruned)
    missing, unexpected = model.load_state_dict(nn.Sequential(other).state_dict(), strict=True)
    assert (missing, unexpected) == ([], [])
    (query, key, value), *_ = inputs(other, "none", "batch first")
    with torch.no_grad():
        for name, layer in pruned.named_children():
            weight = attrgetter("out_proj.weight" if name == "out_proj" else f"{name}_weight")(other)
            weight.masked_fill_(~layer.mask, 0)
    torch.testing.assert_close(pruned(query, key, value), other(query, key, value), rtol=TOLERANCE, atol=TOLERANCE)
    again = build(**options)
    assert again.load_state_dict(sparsify.to_dense(copy.deepcopy(model))[0].state_dict(), strict=True)
    torch.testing.assert_close(again(query, key, value), other(query, key, value), rtol=TOLERANCE, atol=TOLERANCE)
    own = sparsify.convert(nn.Sequential(build(seed=2, **options)))
    own.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(own[0].out_proj.mask, pruned.out_proj.mask)
    state = nn.Sequential(other).state_dict()
    del state["0.out_proj.weight"]
    state["0.in_proj_odd"] = torch.zeros(1)
    found = model.load_state_dict(state, strict=False)
    assert (found.missing_keys[0], found.unexpected_keys) == ("0.out_proj.weight", ["0.in_proj_odd"])


@pytest.mark.parametrize("form", [form for form in FORMS if supports(form, torch.device("cpu"), torch.float32)])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_exported_attention_is_the_masked_one(form: str, options: dict[str, Any]) -> None:
    """Against dense attention with zeros, in float32: at most twice its error against float64; gradients too."""
    _, pruned = flow(options)
    model = nn.Sequential(pruned.float())
    fast = sparsify.export(model, format=form)[0]
    masked = sparsify.to_dense(copy.deepcopy(model))[0]
    assert all(isinstance(child, CSRLinear) and child.form == form for child in fast.children())
    n_tried = 0
    for sharing in SHARING if "kdim" not in options else ("none",):
        given, *_ = inputs(masked, sharing, "batch first")
        short = {id(x): x.detach().float().requires_grad_() for x in given}
        found, wanted = ([*results(one, [short[id(x)] for x in given], names=INPUTS_ONLY)] for one in (fast, masked))
        exact = [*results(copy.deepcopy(masked).double(), given, names=INPUTS_ONLY)]
        for one, other, truth in zip(found, wanted, exact, strict=True):
            limit = 2 * (other - truth).abs().max() + 16 * torch.finfo(torch.float32).eps * truth.abs().max()
            assert (one - truth).abs().max() <= limit
            n_tried += 1
    assert n_tried > 0


@pytest.mark.parametrize("exported", [False, True])
def test_no_row_is_computed_that_is_not_needed(exported: bool) -> None:
    _, pruned = flow(PACKED)
    attention = sparsify.export(pruned, format="csr") if exported else pruned
    asked: list[Any] = []
    attention.in_proj.register_forward_pre_hook(lambda _, a, k: asked.append(k.get("rows")), with_kwargs=True)
    for sharing, rows in (
        ("all", [None]),
        ("key and value", [(0, 6), (6, 18)]),
        ("query and key", [(0, 12), (12, 18)]),
        ("none", [(0, 6), (6, 12), (12, 18)]),
    ):
        attention(*inputs(pruned, sharing, "batch first")[0])
        assert asked == rows
        asked.clear()


def test_layers_are_chosen_one_by_one() -> None:
    def chosen(**options: Any) -> dict[str, type]:
        model = sparsify.convert(nn.ModuleDict({"attention": build(), "fc": nn.Linear(4, 4)}), **options)
        return {name: type(module) for name, module in model.named_modules() if not list(module.children())}

    S, D = SparseLinear, nn.Linear
    assert chosen(include="*.in_proj") == {"attention.in_proj": S, "attention.out_proj": D, "fc": D}
    assert chosen(exclude="*.in_proj") == {"attention.in_proj": D, "attention.out_proj": S, "fc": S}
    assert chosen(include=nn.MultiheadAttention) == {"attention.in_proj": S, "attention.out_proj": S, "fc": D}
    assert chosen(types=nn.MultiheadAttention) == {"attention.in_proj": S, "attention.out_proj": S, "fc": D}
    untouched = sparsify.convert(nn.ModuleDict({"attention": build(), "fc": nn.Linear(4, 4)}), exclude="attention.*")
    assert type(untouched["attention"]) is nn.MultiheadAttention
    with pytest.raises(ValueError, match=r"for the 2 layers inside 'attention' write 'attention\.\*'"):
        chosen(include="attention")
    again = sparsify.convert(nn.Sequential(build()), include="*.in_proj")
    sparsify.convert(again)
    assert isinstance(again[0].out_proj, SparseLinear)
    assert sparsify.prune(again, 0.5, include=nn.MultiheadAttention)[0].in_proj.sparsity == 0.5


def test_what_torch_pruned_stays_pruned() -> None:
    attention, given = build(batch_first=True), (X, X, X)
    torch_prune.random_unstructured(attention, "in_proj_weight", 0.5)
    torch_prune.l1_unstructured(attention.out_proj, "weight", 0.25)
    expected = attention(*given)[0]
    kept = attention.in_proj_weight_mask.bool()
    model = sparsify.convert(nn.Sequential(attention))
    assert torch.equal(model[0].in_proj.mask, kept)
    assert model[0].out_proj.sparsity == 0.25
    torch.testing.assert_close(model[0](*given)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert list(sparsify.to_dense(model).state_dict()) == list(nn.Sequential(build()).state_dict())
    torch.testing.assert_close(attention(*given)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)


class Own(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def with_odd_out_proj() -> nn.MultiheadAttention:
    attention = build()
    attention.out_proj = nn.Sequential()  # type: ignore[assignment]
    return attention


def with_pruned_bias() -> nn.MultiheadAttention:
    return torch_prune.random_unstructured(build(), "in_proj_bias", 0.5)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Own(EMBED, HEADS), r"it is a Own, a subclass of nn\.MultiheadAttention that may compute something"),
        (with_odd_out_proj, "its out_proj is a Sequential that may compute something else"),
        (with_pruned_bias, "its bias is pruned too; make that permanent"),
        (lambda: nn.utils.weight_norm(build(), "in_proj_weight"), "its in_proj_weight is computed by a hook"),
    ],
    ids=["subclass", "out_proj", "bias", "weight_norm"],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_what_cannot_be_laid_out_stays_dense_and_says_why(make: Callable[[], nn.Module], why: str) -> None:
    model = nn.ModuleDict({"odd": make(), "fc": nn.Linear(4, 4)})
    kind = type(model["odd"])
    with pytest.warns(LeftDenseWarning, match=rf"1 layer stays dense, .*odd \({why}"):
        sparsify.convert(model)
    assert type(model["odd"]) is kind
    assert isinstance(model["fc"], SparseLinear)


def test_a_tied_weight_is_an_error() -> None:
    attention, linear = build(), nn.Linear(EMBED, 3 * EMBED)
    linear.weight = attention.in_proj_weight  # type: ignore[assignment]
    model = nn.ModuleDict({"attention": attention, "fc": linear})
    with pytest.raises(ValueError, match=r"attention\.in_proj_weight and fc\.weight are one Parameter") as error:
        sparsify.convert(model)
    assert "exclude=['attention.*']" in str(error.value)
    assert type(attention) is nn.MultiheadAttention


def test_training_moves_kept_weights_only() -> None:
    _, pruned = flow(PACKED, 0.75)
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=0.1)
    before = copy.deepcopy(pruned.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        pruned(X, X, X)[0].square().sum().backward()
        for layer in (pruned.in_proj, pruned.out_proj):
            assert not layer.weight.grad[~layer.mask].any()
        optimizer.step()
    for name in ("in_proj", "out_proj"):
        layer, old = getattr(pruned, name), before[f"{name}.weight"]
        assert (layer.weight != old)[layer.mask].all()
        assert torch.equal(layer.weight[~layer.mask], old[~layer.mask])


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_life_of_a_module() -> None:
    _, pruned = flow(PACKED)
    pruned = pruned.float()
    fast, x = sparsify.export(pruned, format="csr"), X.float()
    for one in (pruned, fast):
        expected = one(x, x, x)
        for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert torch.equal(twin(x, x, x)[0], expected[0])
        assert torch.equal(torch.compile(one, fullgraph=True, backend="eager")(x, x, x)[0], expected[0])
        traced = torch.jit.trace(one, (x, x, x))
        torch.testing.assert_close(traced(x, x, x)[0], expected[0])
        torch.testing.assert_close(torch.export.export(one, (x, x, x)).module()(x, x, x)[0], expected[0])
        with torch.autocast("cpu", torch.bfloat16):
            half = one(x, x, x)[0]
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected[0], rtol=0.1, atol=0.1)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            moved = copy.deepcopy(one).to(dtype)
            assert moved(x.to(dtype), x.to(dtype), x.to(dtype))[0].dtype == dtype
        assert one.to("meta")(*[x.to("meta")] * 3)[0].shape == x.shape


def test_save_and_load_onto_a_fresh_dense_model(tmp_path: Path) -> None:
    for options in KINDS:
        _, pruned = flow(options)
        model = nn.Sequential(pruned)
        (query, key, value), *_ = inputs(pruned, "none", "batch first")
        for saved in (model, sparsify.export(model, format="csr"), sparsify.to_dense(copy.deepcopy(model))):
            sparsify.save(saved, tmp_path / "model.safetensors")
            fresh = sparsify.load(tmp_path / "model.safetensors", nn.Sequential(build(seed=5, **options)))
            assert type(fresh[0]) is type(saved[0])
            assert torch.equal(fresh[0](query, key, value)[0], saved[0](query, key, value)[0])
    with torch.device("meta"):
        empty = nn.Sequential(nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **KINDS[-1]))
    loaded = sparsify.load(tmp_path / "model.safetensors", empty)
    assert torch.equal(loaded[0](query, key, value)[0], saved[0](query, key, value)[0])


def test_a_file_that_does_not_fit_leaves_the_attention_alone(tmp_path: Path) -> None:
    _, pruned = flow(PACKED)
    sparsify.save(nn.Sequential(pruned, nn.Linear(2, 2)), tmp_path / "model.safetensors")
    dense = nn.Sequential(build())
    before = dense.state_dict(keep_vars=True)
    with pytest.raises(sparsify.CheckpointError, match="for another architecture"):
        sparsify.load(tmp_path / "model.safetensors", dense)
    assert type(dense[0]) is nn.MultiheadAttention
    after = dense.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is parameter for key, parameter in before.items())


def test_recipes_and_reports_name_the_projections() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16)
    recipe = sparsify.Recipe(groups=[{"layers": ["*self_attn*"], "sparsity": 0.5}])
    planned = plan(recipe, layer)
    assert [(one.name, one.shape) for one in planned] == [
        ("self_attn.in_proj", (24, 8)),
        ("self_attn.out_proj", (8, 8)),
    ]
    assert type(layer.self_attn) is nn.MultiheadAttention  # a plan touches nothing
    sparsify.convert(layer)
    assert plan(recipe, layer) == planned
    pruner = sparsify.Pruner(layer, recipe)
    pruner.step()
    assert {row.name: row.sparsity for row in sparsify.report(layer)} == {
        "self_attn.in_proj": 0.5,
        "self_attn.out_proj": 0.5,
        "multihead_attn.in_proj": 0,
        "multihead_attn.out_proj": 0,
        "linear1": 0,
        "linear2": 0,
    }


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_calibration_sees_the_projections(method: str) -> None:
    """The rows of queries and those of keys and values see different inputs in one layer: its Gram matrix has both."""
    torch.manual_seed(0)
    model = sparsify.convert(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0))
    sparsify.prune(model, 0.5, method=method, data=[(torch.randn(5, 3, 8), torch.randn(4, 3, 8)) for _ in range(8)])
    assert [row.sparsity for row in sparsify.report(model)] == [0.5] * 6

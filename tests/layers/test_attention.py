"""UnfusedAttention against nn.MultiheadAttention: every argument, outputs and gradients, in and out of convert."""

import itertools
from typing import Any

import pytest
import torch
from attention_inputs import (
    EMBED,
    LAYOUTS,
    MASKS,
    NONE,
    SHARING,
    TOLERANCE,
    X,
    build,
    inputs,
    masks,
    results,
)
from torch import nn

from sparsify.layers import UnfusedAttention

pytestmark = pytest.mark.usefixtures("one_thread")

#: How the attention is built.
BUILDS = [
    {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero, "kdim": kdim, "vdim": vdim}
    for bias, bias_kv, zero, (kdim, vdim) in itertools.product(
        (True, False), (False, True), (False, True), ((None, None), (EMBED, 5), (4, 5))
    )
]
WEIGHTS = ({"need_weights": False}, {}, {"average_attn_weights": False})


@pytest.mark.parametrize("number", range(len(BUILDS)), ids=lambda number: str(BUILDS[number]))
def test_every_argument(number: int) -> None:
    """Each build meets a fifth of all combinations of arguments, and other builds the other fifths."""
    options, n_compared = BUILDS[number], 0
    sharings = ("none",) if options["kdim"] else SHARING
    combinations = list(itertools.product(sharings, LAYOUTS, MASKS, WEIGHTS))
    for sharing, layout, kind, weights in combinations[number % 5 :: 5]:
        attention = build(**options, batch_first=layout == "batch first")
        layered = UnfusedAttention(attention)
        given, n_queries, n_keys = inputs(attention, sharing, layout)
        arguments = {**masks(kind, layout, n_queries, n_keys), **weights}
        found, wanted = (results(one, given, **arguments) for one in (layered, attention))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
            n_compared += 1
    assert n_compared >= 4 * len(combinations[number % 5 :: 5])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("sharing", SHARING)
def test_no_less_exact_than_torch_in_float32(sharing: str, weights: dict[str, Any]) -> None:
    """The error against float64 is at most twice torch's own, and a few units of rounding."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    query, key, value = (torch.randn(2, 33, 64) for _ in range(3))
    key = query if sharing in ("all", "query and key") else key
    value = key if sharing in ("all", "key and value") else value
    found, wanted = (one(query, key, value, **weights)[0] for one in (UnfusedAttention(attention), attention))
    exact = attention.double()(query.double(), key.double(), value.double(), **weights)[0]
    limit = 2 * (wanted - exact).abs().max() + 4 * torch.finfo(torch.float32).eps
    assert (found - exact).abs().max() <= limit


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_torchs_fused_inference_gives_the_same(kind: str, weights: dict[str, Any]) -> None:
    attention = build(batch_first=True).eval()
    (x, _, _), n_queries, n_keys = inputs(attention, "all", "batch first")
    arguments = {**masks(kind, "batch first", n_queries, n_keys), **weights}
    with torch.no_grad():
        for one, other in zip(
            UnfusedAttention(attention)(x, x, x, **arguments), attention(x, x, x, **arguments), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_draws_what_torch_draws(batch_first: bool, weights: dict[str, Any]) -> None:
    attention = build(dropout=0.5, batch_first=batch_first)
    layered, x = UnfusedAttention(attention), torch.randn(4, 4, EMBED, dtype=torch.float64)
    drawn = []
    for one in (layered, attention):
        torch.manual_seed(3)
        drawn.append(one(x, x, x, **weights))
    for one, other in zip(*drawn, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
    with torch.no_grad():
        plain = build(dropout=0.0, batch_first=batch_first)(x, x, x)[0]
        assert not torch.allclose(layered(x, x, x)[0], plain)
        torch.testing.assert_close(layered.eval()(x, x, x)[0], plain, rtol=TOLERANCE, atol=TOLERANCE)


#: What nobody can attend to: how the attention is built, and what is wrong with its arguments.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4-d query": ({}, {"query": X[None]}),
    "2-d query, 3-d key": ({}, {"query": X[0]}),
    "2-d key": ({}, {"key": X[0]}),
    "narrow query": ({}, {"query": X[..., :4]}),
    "narrow key": ({}, {"key": X[..., :4], "value": X[..., :4]}),
    "short key": ({}, {"key": X[:, :2]}),
    "kdim": ({"kdim": 5}, {}),
    "short value": ({"kdim": 6, "vdim": 5}, {"value": X[:, :2, :5]}),
    "causal without mask": ({}, {"is_causal": True}),
    "integer padding": ({}, {"key_padding_mask": NONE.long()}),
    "integer mask": ({}, {"attn_mask": torch.zeros(3, 3).long()}),
    "1-d padding": ({}, {"key_padding_mask": NONE[0]}),
    "short padding": ({}, {"key_padding_mask": NONE[:, :2]}),
    "wide mask": ({}, {"attn_mask": torch.zeros(3, 4)}),
    "mask of 3 heads": ({}, {"attn_mask": torch.zeros(3, 3, 3)}),
    "1-d mask": ({}, {"attn_mask": torch.zeros(3)}),
    "float32 query": ({}, {"query": X.float()}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_refused(case: str) -> None:
    options, arguments = REFUSED[case]
    attention = build(batch_first=True, **options)
    raised = []
    for one in (attention, UnfusedAttention(attention)):
        with pytest.raises((AssertionError, RuntimeError)) as error:
            one(**{"query": X, "key": X, "value": X, **arguments})
        raised.append(error.type)
    assert raised[0] is raised[1]


nested_notice = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")


@nested_notice
def test_nested_inputs() -> None:
    """As torch's fused inference, the only place where it takes them; and elsewhere as each sequence alone."""
    attention = build(batch_first=True).eval()
    layered = UnfusedAttention(attention)
    rows = [X[0, :2].clone().requires_grad_(), X[1].clone().requires_grad_()]
    nested = torch.nested.as_nested_tensor(rows)
    with torch.no_grad():
        for weights in WEIGHTS:
            (output, ours), (expected, theirs) = (
                one(nested, nested, nested, **weights) for one in (layered, attention)
            )
            assert output.is_nested
            for one, other in zip(output.unbind(), expected.unbind(), strict=True):
                torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    for layout in (torch.strided, torch.jagged):
        given = torch.nested.as_nested_tensor(rows, layout=layout)
        output, _ = layered.train()(given, given, given, need_weights=False)
        assert output.layout == layout
        loss = sum(row.square().sum() for row in output.unbind())
        wanted = [attention(row, row, row)[0] for row in rows]
        for one, other in zip(output.unbind(), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
        found = torch.autograd.grad(loss, rows)
        for one, other in zip(found, torch.autograd.grad(sum(y.square().sum() for y in wanted), rows), strict=True):
            torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@nested_notice
def test_what_cannot_be_nested_is_said() -> None:
    nested = torch.nested.as_nested_tensor([X[0, :2], X[1]])
    layered = UnfusedAttention(build(batch_first=True))
    with pytest.raises(AssertionError, match="nested inputs need batch_first=True, and take no key_padding_mask"):
        layered(nested, nested, nested, key_padding_mask=NONE)
    with pytest.raises(AssertionError, match="must be nested tensors all three, or none"):
        layered(nested, X, X)
    with pytest.raises(AssertionError, match="nested inputs need batch_first=True"):
        UnfusedAttention(build())(nested, nested, nested)

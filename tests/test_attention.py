"""LayeredAttention against nn.MultiheadAttention: every argument, outputs and gradients, in and out of convert."""

import itertools
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.layers import LayeredAttention

pytestmark = pytest.mark.usefixtures("one_thread")

EMBED, HEADS, BATCH, QUERIES, KEYS = 6, 2, 2, 3, 4

#: An output or gradient is a chain of 5 sums (two projections and two products on the way there, one more on the way
#: back) of at most 3 x EMBED x KEYS terms. In two orders, sums of n terms about 1 differ by at most 2 n units of
#: rounding, and a factor of 4 is for terms that are larger than 1.
TOLERANCE = 4 * 5 * 2 * (3 * EMBED * KEYS) * torch.finfo(torch.float64).eps

#: How the attention is built.
BUILDS = [
    {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero, "kdim": kdim, "vdim": vdim}
    for bias, bias_kv, zero, (kdim, vdim) in itertools.product(
        (True, False), (False, True), (False, True), ((None, None), (EMBED, 5), (4, 5))
    )
]
LAYOUTS = ("batch first", "sequence first", "unbatched")
#: Which of query, key and value are one tensor.
SHARING = ("all", "key and value", "query and key", "none")
MASKS = (
    "none",
    "padding",
    "float padding",
    "2-d",
    "3-d",
    "float 2-d",
    "padding and 2-d",
    "float padding and 3-d",
    "causal",
)
PARAMETERS = (
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"),
    *("out_proj.weight", "out_proj.bias", "bias_k", "bias_v"),
)
WEIGHTS = ({"need_weights": False}, {}, {"average_attn_weights": False})


def build(seed: int = 0, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if "bias" in name:  # torch starts with zeros, which would hide a bias that is left out
                parameter.normal_()
    return attention


def inputs(attention: nn.MultiheadAttention, sharing: str, layout: str) -> tuple[list[Tensor], int, int]:
    """Return query, key and value, and how many queries and keys there are."""
    n_queries = KEYS if sharing in ("all", "query and key") else QUERIES

    def draw(seed: int, length: int, width: int) -> Tensor:
        x = torch.randn(BATCH, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = {"batch first": x, "sequence first": x.transpose(0, 1).contiguous(), "unbatched": x[0].clone()}[layout]
        return x.requires_grad_()

    query = draw(1, n_queries, EMBED)
    key = query if sharing in ("all", "query and key") else draw(2, KEYS, attention.kdim)
    value = key if sharing in ("all", "key and value") else draw(3, KEYS, attention.vdim)
    return [query, key, value], n_queries, KEYS


def masks(kind: str, layout: str, n_queries: int, n_keys: int) -> dict[str, Any]:
    """Return the arguments about masks; no query is left without a key."""
    generator = torch.Generator().manual_seed(4)
    batch = () if layout == "unbatched" else (BATCH,)
    padding = torch.rand(*batch, n_keys, generator=generator) < 0.4
    heads = (HEADS if layout == "unbatched" else BATCH * HEADS,) if "3-d" in kind else ()
    mask = torch.rand(*heads, n_queries, n_keys, generator=generator) < 0.4
    padding[..., 0] = mask[..., 0] = False
    if kind == "causal":
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool).triu(1)
    found: dict[str, Any] = {"is_causal": True} if kind == "causal" else {}
    if "padding" in kind:
        found["key_padding_mask"] = padding
    if "-d" in kind or kind == "causal":
        found["attn_mask"] = mask
    if "float" in kind:
        found = {name: torch.randn(m.shape, generator=generator, dtype=torch.float64) for name, m in found.items()}
    return found


def results(attention: nn.Module, given: list[Tensor], **arguments: Any) -> Iterator[Tensor]:
    """Yield the output, the weights, and the gradients of all inputs and parameters."""
    output, weights = attention(*given, **arguments)
    yield output
    total = (output * torch.arange(output.numel(), dtype=output.dtype).view_as(output).cos()).sum()
    if weights is not None:
        yield weights
        total = total + weights.square().sum()
    parameters = [attrgetter(name)(attention) for name in PARAMETERS]
    wanted = {id(x): x for x in (*given, *parameters) if x is not None}
    yield from torch.autograd.grad(total, list(wanted.values()))


@pytest.mark.parametrize("number", range(len(BUILDS)), ids=lambda number: str(BUILDS[number]))
def test_every_argument(number: int) -> None:
    """Each build meets a quarter of all combinations of arguments, and other builds the other quarters."""
    options, n_compared = BUILDS[number], 0
    sharings = ("none",) if options["kdim"] else SHARING
    combinations = list(itertools.product(sharings, LAYOUTS, MASKS, WEIGHTS))
    for sharing, layout, kind, weights in combinations[number % 4 :: 4]:
        attention = build(**options, batch_first=layout == "batch first")
        layered = LayeredAttention(attention)
        given, n_queries, n_keys = inputs(attention, sharing, layout)
        arguments = {**masks(kind, layout, n_queries, n_keys), **weights}
        found, wanted = (results(one, given, **arguments) for one in (layered, attention))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
            n_compared += 1
    assert n_compared >= 4 * len(combinations[number % 4 :: 4])

"""Attentions, and inputs and masks for them, in every layout and sharing."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

EMBED, HEADS, BATCH, QUERIES, KEYS = 6, 2, 2, 3, 4

#: An output or gradient is a chain of 5 sums (two projections and two products on the way there, one more on the way
#: back) of at most 3 x EMBED x KEYS terms. In two orders, sums of n terms about 1 differ by at most 2 n units of
#: rounding, and a factor of 4 is for terms that are larger than 1.
TOLERANCE = 4 * 5 * 2 * (3 * EMBED * KEYS) * torch.finfo(torch.float64).eps
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


INPUTS_ONLY = ()


def results(
    attention: nn.Module, given: list[Tensor], names: tuple[str, ...] = PARAMETERS, **arguments: Any
) -> Iterator[Tensor]:
    """Yield the output, the weights, and the gradients of all inputs and of the named parameters."""
    output, weights = attention(*given, **arguments)
    yield output
    total = (output * torch.arange(output.numel(), dtype=output.dtype).view_as(output).cos()).sum()
    if weights is not None:
        yield weights
        total = total + weights.square().sum()
    parameters = [attrgetter(name)(attention) for name in names]
    wanted = {id(x): x for x in (*given, *parameters) if x is not None}
    yield from torch.autograd.grad(total, list(wanted.values()))


X = torch.randn(2, 3, EMBED, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
NONE = torch.zeros(2, 3, dtype=torch.bool)

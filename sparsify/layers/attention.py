"""UnfusedAttention: torch's multi-head attention with a layer for each of its projections."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.layers.construct import linear_from_parameters
from sparsify.layers.csr_linear import CSRLinear
from sparsify.layers.sparse_linear import SparseLinear
from sparsify.layers.tracing import call_node, tracer_of

#: The attributes of an nn.MultiheadAttention beside its Parameters.
_SETTINGS = (
    *("embed_dim", "kdim", "vdim", "num_heads", "head_dim"),
    *("dropout", "batch_first", "add_zero_attn", "training"),
)


def _weight_of(layer: str) -> Any:
    """Return a property with the weight of a child layer, None without that child."""
    return property(lambda self: self._modules[layer].weight if layer in self._modules else None)


class UnfusedAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention with its projections as layers, to be pruned and exported like any other.

    `in_proj` (3 embed_dim, embed_dim) and `out_proj`; with a kdim or vdim of its own, `q_proj`, `k_proj` and `v_proj`
    instead of the first, with their biases in `in_proj_bias`. Each layer is an nn.Linear, SparseLinear or CSRLinear
    over the Parameters of the original attention.

    Arguments and results are those of nn.MultiheadAttention, up to the order of additions; the state_dict of one loads.
    torch's fused inference kernel never runs, as it would read the weights past their masks. Nested inputs work in any
    mode; torch takes them in that kernel only.

    >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
    >>> unfused, x = UnfusedAttention(attention), torch.ones(1, 3, 8)
    >>> torch.allclose(unfused(x, x, x)[0], attention(x, x, x)[0])
    True
    """

    in_proj_weight = _weight_of("in_proj")
    q_proj_weight = _weight_of("q_proj")
    k_proj_weight = _weight_of("k_proj")
    v_proj_weight = _weight_of("v_proj")

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: getattr(attention, name) for name in _SETTINGS})
        self._qkv_same_embed_dim = False  # keeps an nn.TransformerEncoderLayer from its fused kernel
        bias = attention.in_proj_bias
        if attention._qkv_same_embed_dim:
            self.in_proj = linear_from_parameters(nn.Linear, attention.in_proj_weight, bias)
        else:
            for name in ("q_proj", "k_proj", "v_proj"):
                self.add_module(name, linear_from_parameters(nn.Linear, getattr(attention, f"{name}_weight"), None))
            self._parameters["in_proj_bias"] = bias
        self.out_proj = linear_from_parameters(nn.Linear, attention.out_proj.weight, attention.out_proj.bias)  # type: ignore[assignment]
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v

    def to_attention(self) -> nn.MultiheadAttention:
        """Make an nn.MultiheadAttention of the same Parameters; the layers must be dense by now."""
        attention = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.in_proj_bias is not None,
            add_bias_kv=self.bias_k is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        for name in attention._parameters:
            attention._parameters[name] = getattr(self, name)
        attention.out_proj._parameters.update(self.out_proj._parameters)
        return attention.train(self.training)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers with the weights."""
        return tuple(name for name in ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj") if name in self._modules)

    @property
    def in_proj_bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The biases of the first three projections, after each other."""
        packed = self._modules.get("in_proj")
        return self._parameters["in_proj_bias"] if packed is None else packed._parameters["bias"]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the arguments and results of nn.MultiheadAttention."""
        if (tracer := tracer_of(query, key, value)) is not None:
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return call_node(self, tracer, query, key, value, *options)  # type: ignore[no-any-return]
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None or not self.batch_first:
                raise AssertionError("nested inputs need batch_first=True, and take no key_padding_mask or attn_mask")
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)
        padding, mask, causal = key_padding_mask, attn_mask, is_causal
        padding = F._canonical_mask(padding, "key_padding_mask", F._none_or_dtype(mask), "attn_mask", query.dtype)
        mask = F._canonical_mask(mask, "attn_mask", None, "", query.dtype, False)
        batched = F._mha_shape_check(query, key, value, padding, mask, self.num_heads)  # type: ignore[attr-defined]
        if causal and mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
        self._check_widths(query, key, value)

        seq_first = batched and not self.batch_first
        q, k, v = (self._heads(x, seq_first) for x in self._project(query, key, value))
        mask = self._merged_mask(mask, padding, q, k)
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            output = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            causal = causal and padding is None
            output = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal)
        output = output.transpose(1, 2)  # (batch, sequence, heads, head_dim)
        # In training the memory layout is torch's: a dropout after this draws in that order.
        transposed = seq_first or (batched and self.training)
        output = self.out_proj((output.transpose(0, 1) if transposed else output).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if transposed and self.batch_first else output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Run the first projections: only the needed rows, and neighbours with the same input in one product."""
        inputs = (query, key, value)
        if "in_proj" not in self._modules:
            layers = [self.get_submodule(f"{name}_proj") for name in "qkv"]
            projected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
            if self.in_proj_bias is None:
                return projected
            return [y + bias for y, bias in zip(projected, self.in_proj_bias.chunk(3), strict=True)]
        starts = [i for i in range(3) if i == 0 or inputs[i] is not inputs[i - 1]]
        outputs: list[Tensor] = []
        for start, end in zip(starts, [*starts[1:], 3], strict=True):
            product = _linear_rows(self.in_proj, inputs[start], start * self.embed_dim, end * self.embed_dim)
            outputs += product.chunk(end - start, dim=-1)
        return outputs

    def _heads(self, x: Tensor, seq_first: bool) -> Tensor:
        """View a projection as (batch, heads, sequence, head_dim)."""
        x = x.unsqueeze(0) if x.dim() == 2 else x.transpose(0, 1) if seq_first else x
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Append the rows of add_bias_kv and add_zero_attn to the keys or values of each head."""
        shape = (x.shape[0], self.num_heads, 1, self.head_dim)
        if bias is not None:
            x = torch.cat([x, bias.view(1, self.num_heads, 1, self.head_dim).expand(shape)], dim=2)
        return torch.cat([x, x.new_zeros(shape)], dim=2) if self.add_zero_attn else x

    def _merged_mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Return the sum of both masks, (batch or 1, heads or 1, query or 1, keys with the rows of `_extended`)."""
        batch, heads, n_queries, n_keys = *q.shape[:3], k.shape[2]
        n_more = int(self.bias_k is not None) + int(self.add_zero_attn)
        if mask is not None:
            wanted = (n_queries, n_keys) if mask.dim() == 2 else (batch * heads, n_queries, n_keys)
            if mask.shape != wanted:
                raise RuntimeError(f"the shape of the attn_mask is {tuple(mask.shape)}, but should be {wanted}")
            mask = F.pad(mask.reshape(-1, heads if mask.dim() == 3 else 1, n_queries, n_keys), (0, n_more))
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding[None]
            if padding.shape != (batch, n_keys):
                raise AssertionError(
                    f"the shape of the key_padding_mask is {tuple(padding.shape)}, but should be {(batch, n_keys)}"
                )
            padding = F.pad(padding[:, None, None], (0, n_more))
            mask = padding if mask is None else mask + padding
        return mask

    def _check_widths(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        wanted = [("query", query, self.embed_dim)]
        if "in_proj" not in self._modules:
            wanted += [("key", key, self.kdim), ("value", value, self.vdim)]
        for name, x, width in wanted:
            if x.shape[-1] != width:
                raise AssertionError(f"{name} must have an embedding dimension of {width}, got {x.shape[-1]}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(f"key and value must have one length, got {tuple(key.shape)} and {tuple(value.shape)}")

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Pad, attend under a padding mask, and remove the padding; attention weights of padding are zero."""
        if not (query.is_nested and key.is_nested and value.is_nested):
            raise AssertionError("query, key and value must be nested tensors all three, or none")
        padded = {id(x): x.to_padded_tensor(0.0) for x in (query, key, value)}
        n_queries, n_keys = ([len(row) for row in x.unbind()] for x in (query, key))
        key_padding = _beyond(n_keys, padded[id(key)])
        q, k, v = (padded[id(x)] for x in (query, key, value))
        output, weights = UnfusedAttention.forward(self, q, k, v, key_padding, need_weights, None, average)
        rows = [row[:n] for row, n in zip(output, n_queries, strict=True)]
        if weights is not None:
            query_padding = _beyond(n_queries, padded[id(query)])[:, :, None]
            weights = weights.masked_fill(query_padding if average else query_padding[:, None], 0.0)
        return torch.nested.as_nested_tensor(rows, layout=query.layout), weights

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load an own state_dict, or one of an nn.MultiheadAttention."""
        for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            layer, _, kind = key.rpartition("_")
            if layer in self._modules and prefix + key in state_dict:
                state_dict[f"{prefix}{layer}.{kind}"] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the number of heads and the layout of a batch."""
        return f"num_heads={self.num_heads}, batch_first={self.batch_first}"


def _linear_rows(layer: nn.Module, x: Tensor, first: int, end: int) -> Tensor:
    """Multiply x by a part of a layer's rows: the outputs from `first` to before `end`."""
    if first == 0 and end == layer.out_features:
        return layer(x)  # type: ignore[no-any-return]
    if isinstance(layer, (SparseLinear, CSRLinear)):
        return layer(x, rows=(first, end))  # type: ignore[no-any-return]
    if type(layer) is nn.Linear:
        return F.linear(x, layer.weight[first:end], None if layer.bias is None else layer.bias[first:end])
    return layer(x)[..., first:end]  # type: ignore[no-any-return]


def _beyond(lengths: list[int], padded: Tensor) -> Tensor:
    """Return a bool mask (batch, sequence), True past each length."""
    return torch.arange(padded.shape[1], device=padded.device) >= torch.tensor(lengths, device=padded.device)[:, None]

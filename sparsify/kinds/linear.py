"""nn.Linear becomes SparseLinear."""

from __future__ import annotations

from torch import Tensor, nn

from sparsify.interop import masked_parts, remove_prune_hook
from sparsify.kinds.kind import Kind
from sparsify.layers import SparseLinear
from sparsify.layers.bare import bare_linear


def _check(linear: nn.Linear) -> None:
    kind = type(linear)
    if isinstance(linear, nn.LazyLinear) and linear.has_uninitialized_params():
        raise ValueError("it is not initialised yet; run one batch through the model first")
    if not (kind.__mro__[1] is nn.Linear and kind.__name__ == "ParametrizedLinear"):
        if kind is not nn.Linear:
            raise ValueError(f"it is a {kind.__name__}, a subclass of nn.Linear that may compute something else")
        if "forward" in linear.__dict__:
            raise ValueError("its forward was replaced on the instance")
    masked_parts(linear)


def _matrices(linear: nn.Linear) -> dict[str, Tensor]:
    return {"": linear.weight}


def _to_sparse(linear: nn.Linear) -> SparseLinear:
    weight, mask = masked_parts(linear)
    remove_prune_hook(linear)
    return SparseLinear.from_linear(bare_linear(nn.Linear, weight, linear.bias), mask)


LINEAR = Kind(nn.Linear, SparseLinear, _check, _matrices, _to_sparse, SparseLinear.to_linear)

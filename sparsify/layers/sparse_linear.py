"""SparseLinear: a Linear under a mask, for pruning and training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.layers.bare import bare_linear
from sparsify.masks import make_masks
from sparsify.methods import Method, resolve_method, takes_seed


class SparseLinear(nn.Linear):
    """A Linear whose weight is used as weight * mask.

    `weight` is a dense Parameter (out_features, in_features), `mask` a bool buffer of the same shape, True = kept.
    Masked weights are set to exactly zero whenever the mask changes, get a gradient of exactly zero, and take no part
    in the forward whatever an optimizer makes of them. It is an nn.Linear, so code that asks for one finds one.

    `sparsity` is the fraction of zeros to start with, chosen by `method` in `pattern` (see `prune`); a seed is for
    methods that draw random numbers, as the default one does.

    >>> layer = SparseLinear(8, 4, 0.75, seed=1)
    >>> layer.sparsity, layer(torch.ones(2, 8)).shape
    (0.75, torch.Size([2, 4]))
    """

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sparsity: float,
        bias: bool = True,
        *,
        method: str | Method = "random",
        pattern: str = "unstructured",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))
        if sparsity != 0 or not self.weight.is_meta:  # without data there is nothing to rank
            self.sparse_update(sparsity, method=method, pattern=pattern, seed=seed)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> SparseLinear:
        """Make a layer that shares the Linear's Parameters; everything is kept, or what `mask` says.

        What a mask removes is set to zero in the shared weight. Raises ValueError if the weight is no Parameter.
        """
        if "weight" not in linear._parameters:
            raise ValueError("its weight is computed, not a Parameter; sparsify.convert takes over what can be")
        if mask is None and isinstance(linear, SparseLinear):
            mask = linear.mask
        layer = bare_linear(cls, linear.weight, linear.bias)
        layer.register_buffer("mask", torch.ones_like(linear.weight, dtype=torch.bool))
        if mask is not None:
            layer.set_mask(mask)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Make a plain nn.Linear that shares the Parameters, with the masked weights set to zero."""
        self.zero_masked()
        return bare_linear(nn.Linear, self.weight, self.bias).train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (..., in_features); returns (..., out_features)."""
        return F.linear(input, self.masked_weight(), self.bias)

    def masked_weight(self) -> Tensor:
        """Return weight * mask.

        Unlike a product, NaN and Inf in a masked weight come to nothing, and so do their gradients.
        """
        return torch.where(self.mask, self.weight, 0.0)

    @property
    def sparsity(self) -> float:
        """The fraction of masked weights (0 for a layer without weights)."""
        total = self.mask.numel()
        return (total - int(self.mask.sum())) / total if total else 0.0

    def sparse_update(
        self,
        sparsity: float | None = None,
        *,
        method: str | Method = "magnitude",
        pattern: str = "unstructured",
        seed: int | None = None,
    ) -> None:
        """Move the mask to a new absolute sparsity, now: at any point of training.

        A higher sparsity removes the lowest of the kept weights; a lower one gives masked weights back, which start at
        zero. Without a seed, a method that draws random numbers takes one from torch's generator, as initial weights
        do.
        """
        if seed is None and takes_seed(resolve_method(method)):
            seed = int(torch.randint(2**62, (), device="cpu"))
        weights, masks = {"": self.weight}, {"": self.mask}
        self.set_mask(make_masks(weights, sparsity, masks=masks, method=method, pattern=pattern, seed=seed)[""])

    def set_mask(self, mask: Tensor) -> None:
        """Use this bool mask, (out_features, in_features), True = kept, and zero what it removes."""
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            raise ValueError(
                f"a mask must be bool of shape {tuple(self.weight.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        with torch.no_grad():
            self.weight.masked_fill_(~mask.to(self.weight.device), 0)
        self.mask = mask.to(self.weight.device, copy=True)

    @torch.no_grad()
    def zero_masked(self) -> None:
        """Set every masked weight to exactly zero."""
        self.weight.masked_fill_(~self.mask, 0)

    def to_coo(self) -> Tensor:
        """Return the kept weights as a torch sparse COO tensor (a copy, without gradient)."""
        weight = self.weight.detach()
        return torch.sparse_coo_tensor(
            self.mask.nonzero().T, weight[self.mask], weight.shape, is_coalesced=True, check_invariants=False
        )

    def to_csr(self) -> Tensor:
        """Return the kept weights as a torch sparse CSR tensor (a copy, without gradient)."""
        return self.to_coo().to_sparse_csr()

    def reset_parameters(self) -> None:
        """Initialise weight and bias afresh, as nn.Linear does; the mask stays."""
        super().reset_parameters()
        if "mask" in self._buffers:
            self.zero_masked()

    def extra_repr(self) -> str:
        """Add the sparsity to what nn.Linear prints."""
        sparsity = "" if self.mask.is_meta else f", sparsity={self.sparsity:.4g}"
        return super().extra_repr() + sparsity

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Move or convert as any module does; the mask stays bool, and is all True where it had no data before."""
        was_meta = self.mask.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.mask.is_meta:
            self.mask = torch.ones_like(self.mask, dtype=torch.bool)
        elif self.mask.dtype != torch.bool:
            self.mask = self.mask.bool()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state_dict with a mask, or a dense one: then the present mask stays."""
        missing_keys: list[str] = args[2]
        mask = state_dict.get(prefix + "mask")
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            args[4].append(f"{prefix}mask must be bool, got {mask.dtype}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "mask" in missing_keys and prefix + "weight" in state_dict:
            missing_keys.remove(prefix + "mask")
            if self.mask.is_meta and not self.weight.is_meta:  # loaded with assign=True into a model without data
                self.mask = torch.ones_like(self.weight, dtype=torch.bool)
        self.zero_masked()

"""Masked: what every layer that trains under a mask can do, whatever it computes with its weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.kernels.cpu import library as native
from sparsify.layers.copies import Origin, bits_of, origins_after, origins_of_copy
from sparsify.layers.fsdp import shard_like, whole
from sparsify.layers.inference_mode import making_tensors, writing_to
from sparsify.layers.masked_weight import GradientAccumulator, masked_weight
from sparsify.layers.sparse_training import SparseTrainingKernels
from sparsify.masking.masks import make_masks
from sparsify.masking.methods.registry import Method, takes_seed
from sparsify.masking.spec import PruningSpec


class MaskedLayer(nn.Module):
    """The contract of a layer with a Parameter `weight` that is used as weight * mask. Mixed in before a layer's class.

    `mask` is a bool buffer of the weight's shape, True = kept. Masked weights are set to exactly zero whenever the mask
    changes, get a gradient of exactly zero, and take no part in the forward whatever an optimizer makes of them. What
    is written into the mask tensor itself counts from the next forward, and zeroes from the next change.

    Everything that chooses, packs or reports weights sees them through `matrix`, as (out_features, in_features). A
    layer of this kind says how its weight is such a matrix, how it is built around one, and computes with
    `masked_weight()` in its forward.
    """

    weight: Tensor
    mask: Tensor
    #: What a Pruner sets while training: what masked weights are (recipe.Group.masked), what backward adds up, and
    #: whether steps may touch kept weights only.
    masked_mode: str = "zero"
    accumulator: GradientAccumulator | None = None
    training_kernels: SparseTrainingKernels | None = None
    #: What shows that a mask stayed behind: the layers that this one was copied from, until it gets a mask of its own,
    #: and how many weights its mask kept when it was set.
    origins: tuple[Origin, ...] = ()
    n_set: int | None = None

    def matrix(self, tensor: Tensor) -> Tensor:
        """View a tensor of the weight's shape as (out_features, in_features): what is written there is written here."""
        raise NotImplementedError

    @classmethod
    def from_matrix(cls, weight: Tensor, mask: Tensor, bias: nn.Parameter | None) -> Self:
        """Make a layer of a weight and a mask, (out_features, in_features); the bias is shared."""
        raise NotImplementedError

    @property
    def weight_matrix(self) -> Tensor:
        """The weight as (out_features, in_features), without gradient; gathered if FSDP has sharded it."""
        return self.matrix(whole(self.weight.detach()))

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape as a matrix, (out_features, in_features)."""
        out_features, in_features = self.matrix(self.mask).shape
        return out_features, in_features

    def rows(self, input: Tensor) -> Tensor:
        """View an input of the layer as (..., in_features), the rows that the weight is multiplied with."""
        return input

    def input_shape(self, n_rows: int) -> tuple[int, ...]:
        """The shape of an input of so many rows, each of which the weight is multiplied with."""
        return n_rows, self.shape[1]

    def masked_weight(self) -> Tensor:
        """Return weight * mask.

        Unlike a product, NaN and Inf in a masked weight come to nothing, and so do their gradients.
        """
        return masked_weight(
            self.weight, self.mask, straight_through=self.masked_mode == "trained", accumulator=self.accumulator
        )

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
        if seed is None and takes_seed(method):
            seed = int(torch.randint(2**62, (), device="cpu"))
        weights, masks = {"": self.weight_matrix}, {"": self.matrix(self.mask)}
        self.set_mask(make_masks(weights, PruningSpec(sparsity, method, pattern, seed=seed), masks=masks)[""])

    def set_mask(self, mask: Tensor, *, back_at_zero: bool = True) -> None:
        """Use this bool mask, (out_features, in_features), True = kept, and zero what it removes.

        What it gives back starts at zero, whatever was written to it meanwhile; back_at_zero=False lets it come back
        with the value it has.
        """
        if mask.dtype != torch.bool or mask.shape != self.shape:
            raise ValueError(f"a mask must be bool of shape {self.shape}, got {mask.dtype} {tuple(mask.shape)}")
        before = self.mask
        with making_tensors():
            new = torch.empty_like(before, device=self.weight.device)
            self.matrix(new).copy_(mask)
        self.mask = new
        self._settle()
        self.zero_masked(before if back_at_zero else None)

    def zero_masked(self, before: Tensor | None = None) -> None:
        """Set every masked weight to exactly zero, unless a Pruner has them keep their values for now.

        Those that a mask `before` this one removed are zeroed too.
        """
        if self.masked_mode == "zero":
            self.clear_masked(self.weight, before)

    @torch.no_grad()
    def clear_masked(self, tensor: Tensor, before: Tensor | None = None) -> None:
        """Set the places of masked weights to zero in a tensor laid out as the weight is, its gradient for one."""
        kept = self.mask if before is None or before.is_meta else self.mask & before.to(self.mask.device)
        if native.can_clear(tensor, kept):
            native.clear_masked(tensor, kept)
        else:
            with writing_to(tensor):
                tensor.masked_fill_(shard_like(~kept, tensor), 0)

    def hides_values(self) -> bool:
        """Return whether a masked weight has a value: of a schedule that goes on, or one that was written there."""
        hidden = self.weight_matrix.masked_fill(self.matrix(self.mask), 0)
        return not hidden.is_meta and bool(hidden.any())

    def to_coo(self) -> Tensor:
        """Return the kept weights, (out_features, in_features), as a torch sparse COO tensor (a copy, no gradient)."""
        weight, mask = self.weight_matrix, self.matrix(self.mask)
        return torch.sparse_coo_tensor(
            mask.nonzero().T, weight[mask], weight.shape, is_coalesced=True, check_invariants=False
        )

    def to_csr(self) -> Tensor:
        """Return the kept weights, (out_features, in_features), as a torch sparse CSR tensor (a copy, no gradient)."""
        return self.to_coo().to_sparse_csr()

    def extra_repr(self) -> str:
        """Add the sparsity to what the dense layer prints."""
        sparsity = "" if self.mask.is_meta else f", sparsity={self.sparsity:.4g}"
        return super().extra_repr() + sparsity

    def _keep_all(self) -> None:
        """Start with a mask that keeps everything."""
        with making_tensors():
            self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool, requires_grad=False))

    def _settle(self) -> None:
        """Take the present mask for the one that is meant."""
        self.origins = ()
        self.n_set = None if self.mask.is_meta else int(self.mask.sum())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy, and remember of what."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy({key: v for key, v in self.__dict__.items() if key != "origins"}, memo))
        made.origins = origins_of_copy(self)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only counts in this process."""
        return {key: value for key, value in self.__dict__.items() if key != "origins"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert as any module does; the mask stays bool, and is all True where it had no data before."""
        was_meta, bits = self.mask.is_meta, bits_of(self.weight) if self.origins else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.origins = origins_after(self.origins, bits, self.weight)
        with making_tensors():
            if was_meta and not self.mask.is_meta:
                self.mask = torch.ones_like(self.mask, dtype=torch.bool)
            elif self.mask.dtype != torch.bool:
                self.mask = self.mask.bool()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state_dict with a mask, or a dense one: then the present mask stays.

        A weight saved with its mask stays as it is: one of a schedule that goes on may hold values that come back.
        """
        missing_keys: list[str] = args[2]
        mask, has_weight = state_dict.get(prefix + "mask"), prefix + "weight" in state_dict
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            args[4].append(f"{prefix}mask must be bool, got {mask.dtype}")
            return
        before = None if has_weight or mask is None else self.mask.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if mask is not None:
            self._settle()
        if before is not None and not self.weight.is_meta:
            self.zero_masked(before)
        elif prefix + "mask" in missing_keys and has_weight:
            missing_keys.remove(prefix + "mask")
            if self.mask.is_meta and not self.weight.is_meta:  # loaded with assign=True into a model without data
                self._keep_all()
            self.zero_masked()

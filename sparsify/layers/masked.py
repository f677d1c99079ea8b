"""MaskedLayer: the contract of every layer trained under a mask."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.kernels.cpu import training
from sparsify.layers.copies import Origin, bits_of, origins_after, origins_of_copy
from sparsify.layers.fsdp import shard_like, whole
from sparsify.layers.inference_mode import making_tensors, writing_to
from sparsify.layers.masked_weight import GradientAccumulator, kept, masked_weight, multiplies_plainly, product_dtype
from sparsify.layers.records import LayerResult
from sparsify.layers.sparse_training import SparseTrainingKernels
from sparsify.masking.masks import make_masks
from sparsify.masking.methods.registry import Method, takes_seed
from sparsify.masking.spec import PruningSpec


class MaskedLayer(nn.Module):
    """The contract of a layer with a Parameter `weight`, used as weight * mask. Mixed in before a dense layer's class.

    `mask` is a bool buffer of the weight's shape, True = kept. Masked weights are set to exactly zero at every change
    of the mask, get a gradient of exactly zero, and take no part in the forward, even after an optimizer has written
    to them. A write into the mask tensor itself counts from the next forward, and zeroes weights at the next change.

    Code for choosing, packing or reporting weights sees them through `matrix`, as (out_features, in_features), and
    writes through `as_weight`. A subclass defines these two and `from_matrix`, and computes with `masked_weight()` in
    its forward.
    """

    weight: Tensor
    mask: Tensor
    #: True for a layer that a run of the model may call any number of times, and another run once.
    several_calls: bool = False
    #: The masked mode ("zero", "frozen" or "trained"), set by a Pruner for a schedule.
    masked_mode: str = "zero"
    #: Sums of gradients from the backward passes, for a Pruner's methods.
    accumulator: GradientAccumulator | None = None
    #: Kernels for training steps on kept weights only, if a Pruner allows them.
    training_kernels: SparseTrainingKernels | None = None
    #: The originals of a copied layer, until the copy gets a mask of its own: signs of a stale mask (copies.py).
    origins: tuple[Origin, ...] = ()
    #: The number of weights kept by the last mask set through a method; a larger one now is such a sign too.
    n_set: int | None = None
    #: The result of the last pruning on data.
    pruning_result: LayerResult | None = None

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as (out_features, in_features): a view, or a copy if there is none."""
        raise NotImplementedError

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out_features, in_features) in the weight's shape: the inverse of `matrix`."""
        raise NotImplementedError

    @classmethod
    def from_matrix(
        cls, weight: Tensor, mask: Tensor, bias: nn.Parameter | None, settings: Mapping[str, Any] | None = None
    ) -> Self:
        """Make a layer of a weight and a mask, (out_features, in_features); the bias is shared.

        settings: those of the dense layer (`settings_of`), for a kind of layer with any.
        """
        raise NotImplementedError

    @classmethod
    def settings_of(cls, layer: nn.Module) -> dict[str, Any]:
        """Return the settings of a layer of this kind, dense or masked, beside its weight, bias and their shapes."""
        return {}

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
        """View an input of the layer as (..., in_features), the rows multiplied with the weight."""
        return input

    def row_parts(self, input: Tensor) -> Iterator[Tensor]:
        """Yield the rows in parts, each of bounded memory where `rows` needs more than the input."""
        yield self.rows(input)

    @property
    def multiplies_rows(self) -> bool:
        """True if the weight is a factor of rows of the input: else methods on calibration data do not apply."""
        return True

    @property
    def input_groups(self) -> int:
        """The number of groups of outputs with rows of their own.

        Then rows are (..., input_groups, in_features), or in_features for a call with the rows of one group.
        """
        return 1

    def group_of_call(self, args: tuple[Any, ...]) -> int | None:
        """Return the group whose rows the first argument of a call has; None if they are of all groups."""
        return None

    @property
    def rows_key(self) -> tuple[Any, ...]:
        """The settings that decide the rows: layers with the same input and key have the same rows."""
        return ()

    def input_shape(self, n_rows: int) -> tuple[int, ...]:
        """Return the shape of an input with this many rows for the weight."""
        return n_rows, self.shape[1]

    def masked_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return weight * mask, in the weight's dtype or in this one.

        Unlike in a product, NaN and Inf in a masked weight become zero, and so do their gradients.
        """
        through = self.masked_mode == "trained"
        return masked_weight(
            self.weight, self.mask, straight_through=through, accumulator=self.accumulator, dtype=dtype
        )

    def forward_weight(self, *, is_factor: bool = False) -> Tensor:
        """Return weight * mask: in eval mode the weight itself, where its masked values are zero.

        is_factor: it is used as the factor of a product alone; then its dtype may be the one that autocast gives it.

        All masked values are looked at each time, since a write through `weight.data` or NumPy leaves no trace: one
        reading of weight and mask, 0.9 ms at 2048 x 2048 where the copy took 13 ms (one thread, Emerald Rapids).
        Gradients are those of weight * mask.
        """
        if self.training or not multiplies_plainly(self) or training.hides_values(self.weight.detach(), self.mask):
            factor = is_factor and self.accumulator is None
            return self.masked_weight(product_dtype(self.weight, self.mask) if factor else None)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return self.weight
        mask, used = self.mask, self.weight.view_as(self.weight)
        used.register_hook(lambda gradient: kept(gradient, mask))
        return used

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

        A higher sparsity removes the lowest of the kept weights; a lower one gives masked weights back, starting at
        zero. Without a seed, a method with random numbers takes one from torch's generator, as initial weights do.
        """
        if seed is None and takes_seed(method):
            seed = int(torch.randint(2**62, (), device="cpu"))
        weights, masks = {"": self.weight_matrix}, {"": self.matrix(self.mask)}
        self.set_mask(make_masks(weights, PruningSpec(sparsity, method, pattern, seed=seed), masks=masks)[""])

    def set_mask(self, mask: Tensor, *, back_at_zero: bool = True) -> None:
        """Use this bool mask, (out_features, in_features), True = kept, and zero the removed weights.

        Weights that come back start at zero, even after a write to them; with back_at_zero=False they keep their
        present values.
        """
        if mask.dtype != torch.bool or mask.shape != self.shape:
            raise ValueError(f"a mask must be bool of shape {self.shape}, got {mask.dtype} {tuple(mask.shape)}")
        before = self.mask
        with making_tensors():
            new = torch.empty_like(before, device=self.weight.device)
            new.copy_(self.as_weight(mask))
        self.mask = new
        self._settle()
        self.zero_masked(before if back_at_zero else None)

    def zero_masked(self, before: Tensor | None = None) -> None:
        """Set every masked weight to exactly zero, unless their masked mode is another one for now.

        before: an earlier mask; weights removed by it are zeroed too.
        """
        if self.masked_mode == "zero":
            self.clear_masked(self.weight, before)

    @torch.no_grad()
    def clear_masked(self, tensor: Tensor, before: Tensor | None = None) -> None:
        """Set the places of masked weights to zero in a tensor with the weight's layout, such as its gradient."""
        kept = self.mask if before is None or before.is_meta else self.mask & before.to(self.mask.device)
        if training.can_clear(tensor, kept):
            training.clear_masked(tensor, kept)
        else:
            with writing_to(tensor):
                tensor.masked_fill_(shard_like(~kept, tensor), 0)

    def hides_values(self) -> bool:
        """Return whether any masked weight is nonzero: in the middle of a schedule, or after a write to it."""
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
        """Add the sparsity to the description of the dense layer."""
        sparsity = "" if self.mask.is_meta else f", sparsity={self.sparsity:.4g}"
        return super().extra_repr() + sparsity

    def _begin(self, sparsity: float, method: str | Method, pattern: str, seed: int | None) -> None:
        """Prune a new layer."""
        self._keep_all()
        if sparsity != 0 or not self.weight.is_meta:  # without data there is nothing to rank
            self.sparse_update(sparsity, method=method, pattern=pattern, seed=seed)

    def _keep_all(self) -> None:
        """Start with a mask of True only."""
        with making_tensors():
            self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool, requires_grad=False))

    def _settle(self) -> None:
        """Accept the present mask: earlier signs of a stale one no longer count."""
        self.origins = ()
        self.n_set = None if self.mask.is_meta else int(self.mask.sum())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy, and record the original in the copy."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy({key: v for key, v in self.__dict__.items() if key != "origins"}, memo))
        made.origins = origins_of_copy(self)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the origins: they count only in this process."""
        return {key: value for key, value in self.__dict__.items() if key != "origins"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert as any module does; the mask stays bool, and one without data becomes all True."""
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

        A weight saved with its mask stays as it is: in the middle of a schedule, masked values may still come back.
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

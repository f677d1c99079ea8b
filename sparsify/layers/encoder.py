"""UnfusedEncoder: torch's transformer encoder without its fused inference kernel, which reads weights past masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.layers.tracing import call_node, tracer_of


class UnfusedEncoder(nn.TransformerEncoder):
    """An nn.TransformerEncoder with calls of its layers in inference too, and the same results.

    In inference nn.TransformerEncoder packs a padded batch into a nested tensor, and returns zeros (or the final norm
    of zeros) in place of the padding. Here the batch stays padded, and the same zeros are written at the end.
    """

    @property
    def use_nested_tensor(self) -> bool:  # type: ignore[override]
        """False, so torch's forward packs nothing. nn.TransformerEncoder's own decision stays in `__dict__`."""
        return False

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Pass the input through the layers, with the arguments and the result of nn.TransformerEncoder."""
        if (tracer := tracer_of(src)) is not None:
            return call_node(self, tracer, src, mask, src_key_padding_mask, is_causal)  # type: ignore[no-any-return]
        output = super().forward(src, mask, src_key_padding_mask, is_causal)
        if mask is not None or src_key_padding_mask is None or not self._would_pack(src, src_key_padding_mask):
            return output
        blank = output.new_zeros(1, output.shape[-1])
        blank = blank if self.norm is None else self.norm(blank)
        return torch.where(_is_padding(src_key_padding_mask)[..., None], blank, output)

    def _would_pack(self, src: Tensor, src_key_padding_mask: Tensor) -> bool:
        """Return whether nn.TransformerEncoder would turn this input into a nested tensor."""
        first = self.layers[0]
        padding = _is_padding(src_key_padding_mask)
        return bool(
            self.__dict__["use_nested_tensor"]
            and torch.backends.mha.get_fastpath_enabled()
            and src.dim() == 3
            and not src.is_nested
            and not first.training
            and not torch.is_autocast_enabled()
            and not (
                torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in first.parameters()))
            )
            and not (self.mask_check and torch.compiler.is_compiling())
            and (not self.mask_check or not (padding[:, :-1] & ~padding[:, 1:]).any())  # the padding comes last
        )


def _is_padding(src_key_padding_mask: Tensor) -> Tensor:
    """Return a padding mask as bool; in a mask of floats any value but zero is padding, as in torch."""
    return src_key_padding_mask != 0

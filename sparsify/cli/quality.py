"""Quality of a model on its calibration data, before and after, without a function of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsify.calibration.batches import Batch, read_example

#: Batches to look at, and values of each one's output.
N_BATCHES, N_VALUES = 2, 2**22

COSINE, PERPLEXITY = "cosine to the dense outputs, on --data", "perplexity, on --data"


class DataQuality:
    """The outputs of a dense model on the first batches, and the qualities of other models measured by them."""

    @torch.inference_mode()
    def __init__(self, dense: nn.Module, data: Sequence[Any]) -> None:
        self.batches = [read_example(dense, batch) for batch in data[:N_BATCHES]]
        self.outputs = [_output(dense, batch) for batch in self.batches]
        self.of_dense = {COSINE: 1.0, **_perplexity(dense, self.batches)}

    @torch.inference_mode()
    def of(self, model: nn.Module) -> dict[str, float]:
        """Return the mean cosine with the dense outputs, and the perplexity of a causal language model."""
        cosines = [
            F.cosine_similarity(_output(model, batch), dense, dim=-1)
            for batch, dense in zip(self.batches, self.outputs, strict=True)
        ]
        return {COSINE: float(torch.cat(cosines).mean()), **_perplexity(model, self.batches)}


def _output(model: nn.Module, batch: Batch) -> Tensor:
    """Return the first float tensor of the output as rows."""
    output = model(*batch.args, **batch.kwargs)
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    first = next((x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()), None)
    if first is None or first.ndim == 0 or first.numel() == 0:
        return torch.ones(1, 1)
    rows = first.reshape(-1, first.shape[-1]) if first.ndim != 4 else first.flatten(1)
    return rows[: max(N_VALUES // max(rows.shape[1], 1), 1)].float()


def _perplexity(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """Return exp of the mean loss of the next token, for a causal language model on token ids."""
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return {}
    losses = []
    for batch in batches:
        ids = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
        if not isinstance(ids, Tensor):
            return {}
        logits = model(*batch.args, **batch.kwargs).logits
        losses += [F.cross_entropy(x[:-1].float(), y[1:]) for x, y in zip(logits, ids, strict=True)]
    return {PERPLEXITY: float(torch.stack(losses).mean().exp())} if losses else {}

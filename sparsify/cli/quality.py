"""Quality of a model on data, before and after, without a function of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.calibration.batches import Batch
from sparsify.reporting.carry_over import CarryOver, DenseOutputs

#: Batches to look at.
N_BATCHES = 2

COSINE, PERPLEXITY = "cosine to the dense outputs, on --data", "perplexity, on --data"


class DataQuality:
    """The outputs of a dense model on the first batches of its data, and the qualities of other models by them.

    others: batches of other data, by source
    """

    def __init__(self, dense: nn.Module, data: Sequence[Any], others: Mapping[str, Sequence[Any]]) -> None:
        read = {"--data": data, **{f"--check {source}": batches for source, batches in others.items()}}
        self._on = {name: DenseOutputs(dense, batches[:N_BATCHES]) for name, batches in read.items()}
        self.of_dense = self._qualities(dense, dict.fromkeys(read, 1.0))

    def of(self, model: nn.Module) -> dict[str, float]:
        """Return the mean cosines with the dense outputs, and the perplexities of a causal language model.

        Warns if the cosine on other data is far worse.
        """
        cosines = {name: outputs.cosine(model) for name, outputs in self._on.items()}
        CarryOver(cosines["--data"], {name: c for name, c in cosines.items() if name != "--data"}).warn()
        return self._qualities(model, cosines)

    def _qualities(self, model: nn.Module, cosines: Mapping[str, float]) -> dict[str, float]:
        found = {}
        for name, cosine in cosines.items():
            found[COSINE.replace("--data", name)] = cosine
            if (perplexity := _perplexity(model, self._on[name].batches)) is not None:
                found[PERPLEXITY.replace("--data", name)] = perplexity
        return found


@torch.inference_mode()
def _perplexity(model: nn.Module, batches: Sequence[Batch]) -> float | None:
    """Return exp of the mean loss of the next token, for a causal language model on token ids; else None."""
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return None
    losses = []
    for batch in batches:
        ids = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
        if not isinstance(ids, Tensor):
            return None
        logits = model(*batch.args, **batch.kwargs).logits
        losses += [F.cross_entropy(x[:-1].float(), y[1:]) for x, y in zip(logits, ids, strict=True)]
    return float(torch.stack(losses).mean().exp()) if losses else None

"""Calibration data without any data: text that a language model writes itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsify.calibration.eval_mode import eval_without_cache


def generate_data(
    model: nn.Module,
    samples: int,
    tokens: int,
    *,
    batch_size: int = 32,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Tensor]]:
    """Let a dense language model write its own calibration data: batches of {"input_ids": (batch_size, tokens)}.

    samples, tokens: the number of texts, and the length of each
    temperature: of the sampling; below 1 likelier words, above 1 rarer ones
    seed: for the first token, drawn evenly from the vocabulary, and for all others
    progress: show a bar

    The model takes `input_ids` and returns logits (batch, tokens, vocabulary), as its output or as `output.logits`, as
    language models of transformers do; their key-value cache is used. Raises ValueError for another model.

    >>> class Cycle(nn.Module):
    ...     def forward(self, input_ids):
    ...         return 50.0 * nn.functional.one_hot((input_ids + 1) % 5, 5)
    >>> generate_data(Cycle(), 1, 4)[0]["input_ids"].diff().remainder(5).tolist()
    [[1, 1, 1]]

    Liu et al. 2023, arXiv:2305.17888 (data-free quantization).
    """
    if samples < 1 or tokens < 1 or batch_size < 1 or not 0 < temperature < float("inf"):
        raise ValueError(
            "samples, tokens, batch_size and temperature must be positive and finite, "
            f"got {samples}, {tokens}, {batch_size} and {temperature}"
        )
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(batch_size, samples - start) for start in range(0, samples, batch_size)]
    total = len(sizes) * tokens
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        eval_without_cache(model),
        tqdm(total=total, desc="generate", unit="token", disable=not progress or None) as bar,
    ):
        writer = _Writer(model)
        batches = []
        for size in sizes:
            ids = [torch.randint(writer.n_words, (size, 1), generator=generator, device="cpu")]
            bar.update()
            for logits in writer.logits(ids, tokens - 1):
                chances = (logits.double() / temperature).softmax(-1).cpu()
                ids.append(torch.multinomial(chances, 1, generator=generator))
                bar.update()
            batches.append({"input_ids": torch.cat(ids, dim=1).to(writer.device)})
    return batches


class _Writer:
    """A language model that continues texts token by token."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        try:
            known = inspect.signature(model.forward).parameters
            logits = _logits(model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device)))
        except Exception as error:
            raise ValueError(f"the model does not run on input_ids alone, as a language model does: {error}") from error
        if logits is None or logits.shape[:-1] != (1, 2) or not logits.is_floating_point():
            found = "no tensor" if logits is None else f"{logits.dtype} {tuple(logits.shape)}"
            raise ValueError(
                f"generated data needs a language model with logits (batch, tokens, vocabulary), and its output for "
                f"(1, 2) tokens is {found}; give data of your own"
            )
        self.n_words, self._caching = logits.shape[-1], "past_key_values" in known and "use_cache" in known

    def logits(self, ids: list[Tensor], n: int) -> Iterator[Tensor]:
        """Yield n times the logits (batch, vocabulary) behind the tokens in `ids`, to which the caller adds one."""
        past: Any = None
        for _ in range(n):
            if self._caching:
                output = self.model(input_ids=ids[-1].to(self.device), past_key_values=past, use_cache=True)
                past = output.past_key_values
            else:
                output = self.model(input_ids=torch.cat(ids, dim=1).to(self.device))
            logits = _logits(output)
            assert logits is not None
            yield logits[:, -1]


def _logits(output: Any) -> Tensor | None:
    """Return the logits in the output of a language model, if there are any."""
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple) and found else found
    return found if isinstance(found, Tensor) and found.ndim == 3 else None

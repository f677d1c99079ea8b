"""Example inputs of a model on the command line: random images or token ids, or the result of a user's function."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from sparsify.cli.user_code import load_function, sentence
from sparsify.reporting.model_run import Inputs, run

IMAGE_SHAPE, TEXT_TOKENS = (3, 224, 224), 128
MAX_VALUES = 2**28  # 1 GiB of float32


def make_inputs(
    model: nn.Module,
    spec: str,
    *,
    batch: int | None = None,
    seq: int | None = None,
    shape: tuple[int, ...] | None = None,
    function: str | None = None,
) -> Inputs:
    """Make random inputs for the model named `spec`: images for torchvision, token ids for hf.

    batch: number of inputs, 1 by default.
    seq: length of token ids, 128 by default for hf.
    shape: shape of float32 values, 3x224x224 by default for torchvision.
    function: "package.module:function" returns the arguments instead, a tensor, a tuple, or a dict by name.

    Raises ValueError with the way out without a hint at the inputs, and for more than MAX_VALUES values.

    >>> make_inputs(nn.Linear(8, 4), "my.models:small", batch=2, shape=(8,))[0].shape
    torch.Size([2, 8])
    """
    if function is not None:
        if (batch, seq, shape) != (None, None, None):
            raise ValueError(f"--batch, --seq and --shape have no effect beside --inputs {function}")
        inputs = load_function(function, f"--inputs {function}")()
        if isinstance(inputs, Mapping):
            return dict(inputs)
        return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if seq is not None and shape is not None:
        raise ValueError("--seq is for token ids and --shape for other inputs; give one of them")
    batch = 1 if batch is None else batch
    if min(batch, 1 if seq is None else seq, *(shape or (1,))) < 1:
        raise ValueError(f"--batch, --seq and --shape must be positive, got {batch}, {seq} and {shape}")
    source = spec.partition(":")[0]
    name = str(getattr(model, "main_input_name", "input_ids"))
    if shape is None and seq is None:
        if source == "torchvision":
            shape = IMAGE_SHAPE
        elif source == "hf" and name == "input_ids":
            seq = TEXT_TOKENS
        else:
            raise ValueError(
                f"model {spec!r}: its inputs cannot be guessed; give --shape (floats), --seq (token ids), or "
                "--inputs package.module:function, a function that returns the model's arguments"
            )
    if batch * (math.prod(shape) if shape is not None else seq or 1) > MAX_VALUES:
        raise ValueError(
            f"--batch, --seq and --shape ask for more than {MAX_VALUES:,} values; make one of them smaller"
        )
    generator = torch.Generator().manual_seed(0)
    if shape is not None:
        return (torch.randn(batch, *shape, generator=generator, device="cpu"),)
    assert seq is not None
    ids = torch.randint(_vocabulary(model, spec), (batch, seq), generator=generator, device="cpu")
    return {name: ids} if source == "hf" else (ids,)


def check_inputs(model: nn.Module, spec: str, inputs: Inputs) -> None:
    """Run the model once. Raises ValueError with the way out if it does not take these inputs."""
    try:
        with torch.inference_mode():
            run(model, inputs)
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(
            f"model {spec!r} does not run on inputs of {describe(inputs)}: {sentence(error)}; "
            "set --shape or --seq, or make its arguments with --inputs package.module:function"
        ) from error


def _vocabulary(model: nn.Module, spec: str) -> int:
    """Return the number of token ids in the smallest embedding of the model; the time is the same for all ids."""
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if not sizes:
        raise ValueError(f"model {spec!r} has no nn.Embedding, so it takes no token ids; give --shape instead of --seq")
    return min(sizes)


def describe(inputs: Inputs) -> str:
    """Return the shapes of inputs in a few words.

    >>> describe({"input_ids": torch.zeros(1, 128, dtype=torch.int64)})
    '1x128 token ids'
    """
    values = list(inputs.values() if isinstance(inputs, dict) else inputs)
    words = []
    for value in values:
        is_ids = isinstance(value, torch.Tensor) and value.dtype == torch.int64
        shape = "x".join(map(str, value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
        words.append(f"{shape} token ids" if is_ids else shape)
    return ", ".join(words) or "no arguments"

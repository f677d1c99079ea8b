"""Distillation of a pruned model towards the dense one: kept weights are tuned, masked ones stay masked.

One-shot methods mend each layer by itself. Here the kept weights of all layers, the biases and the norms move together,
until the hidden states between the model's blocks are those of the dense model again, on the calibration data.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsify.calibration.batches import Batch, input_rows, read_batches
from sparsify.calibration.block_call import output_tensor
from sparsify.calibration.eval_mode import eval_without_cache
from sparsify.calibration.model_trace import NEVER_RAN, trace_model
from sparsify.calibration.padding import Padding, see_padding
from sparsify.conversion.convert import sparse_layers
from sparsify.conversion.module_surgery import Model
from sparsify.conversion.transaction import Transaction
from sparsify.layers import MaskedLayer
from sparsify.masking.unseen import refuse_unseen

LR = 3e-3
WARM_UP = 0.05  # of the budget; from there the learning rate falls to zero in a straight line


def recover(
    model: Model,
    teacher: nn.Module,
    data: Iterable[Any],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    lr: float = LR,
    seed: int = 0,
    progress: bool = False,
) -> Model:
    """Tune the kept weights of a pruned model towards the teacher's hidden states, in place; return the model.

    model: converted and pruned
    teacher: the dense model, of the same architecture; `copy.deepcopy(model)` before pruning makes one
    data: batches as for `prune`
    steps, seconds: the budget, in batches, in time, or both, whichever ends first; with steps alone the result is the
        same each time
    lr: Adam's highest learning rate
    seed: for the order of the batches
    progress: show a bar

    Trained are the kept weights of the masked layers and every Parameter of one dimension: biases and norms. Masks hold
    exactly. The loss is the mean over the model's blocks (the repeated modules in a row, seen in a run) of the squared
    distance between both models' outputs of the block, relative to the variance of the teacher's; padding does not
    count. A model without such blocks is compared at its output.

    Raises ValueError before training for a missing budget, a teacher with Parameters of the model itself, and data
    unfit for the model; also for a loss of NaN or Inf. After an error the model is as it was.

    >>> import copy
    >>> model = sparsify.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    >>> teacher = copy.deepcopy(model)
    >>> _ = recover(sparsify.prune(model, 0.5), teacher, [torch.randn(16, 8)], steps=10)
    >>> model[0].sparsity
    0.5

    Hinton et al. 2015, arXiv:1503.02531; hidden states as in Romero et al. 2015, arXiv:1412.6550.
    """
    _check_budget(steps, seconds, lr)
    if {id(p) for p in model.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError("the teacher shares Parameters with the model; give a copy made before pruning")
    layers = sparse_layers(model)
    batches = read_batches(model, data)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("the model was made inside torch.inference_mode() and cannot be trained; make it outside")
    with (
        torch.inference_mode(False),
        Transaction(model, teacher) as undo,
        eval_without_cache(model),
        eval_without_cache(teacher),
    ):
        trace, unseen = trace_model(model, layers, batches)
        refuse_unseen({name: why for name, why in unseen.items() if why == NEVER_RAN}, "give data that reaches them")
        places = [block for chain in trace.chains for block in chain] or [""]
        padding = see_padding(model, batches, [("output", place) for place in places])
        with _trained(model, list(layers.values())) as parameters:
            undo.keep(parameters)
            _distil(model, teacher, batches, padding, places, parameters, steps, seconds, lr, seed, progress)
        for layer in layers.values():
            layer.zero_masked()
    return model


def _distil(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    padding: Padding,
    places: Sequence[str],
    parameters: Sequence[nn.Parameter],
    steps: int | None,
    seconds: float | None,
    lr: float,
    seed: int,
    progress: bool,
) -> None:
    """Train until the budget is spent."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    started = time.perf_counter()
    order = _shuffled(len(batches), seed)
    with tqdm(
        total=1.0,
        desc="recover",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        disable=not progress,
    ) as bar:
        for step in range(steps if steps is not None else 2**62):
            spent = max(step / steps if steps else 0.0, (time.perf_counter() - started) / seconds if seconds else 0.0)
            if spent >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * min(spent / WARM_UP + 0.1, 1.0, (1 - spent) / (1 - WARM_UP))
            batch = batches[next(order)]
            with torch.inference_mode(False), torch.enable_grad():
                wanted = _teacher_outputs(teacher, places, batch)
                loss = _loss(_outputs(model, places, batch), wanted, batch, padding)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            if not math.isfinite(value := float(loss.detach())):
                _check_target(wanted)
                raise ValueError(f"the loss became {value} in step {step + 1}; take a lower lr than {lr:g}")
            optimizer.step()
            bar.update(spent - bar.n)
            bar.set_postfix_str(f"loss {value:.4f}")


def _loss(outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], batch: Batch, padding: Padding) -> Tensor:
    """Average over the blocks the squared distance of the outputs, relative to the variance of the teacher's."""
    total = torch.zeros((), device=next(iter(outputs.values())).device)
    for place, output in outputs.items():
        counts = padding.counts(("output", place), 0, output.shape[:-1], batch)
        rows, target = input_rows(output, counts).float(), input_rows(wanted[place], counts).float()
        scale = (target - target.mean(0)).square().sum() + torch.finfo(torch.float32).tiny
        total = total + (rows - target).square().sum() / scale
    return total / len(outputs)


def _check_target(wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the block, if the teacher's output holds NaN or Inf."""
    for place, target in wanted.items():
        if not torch.isfinite(target).all():
            raise ValueError(
                f"{place or '(root)'}: the teacher's output on the calibration data holds NaN or Inf; mend the data, "
                "or use float32 or bfloat16 where float16 overflows"
            )


def _teacher_outputs(teacher: nn.Module, places: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return _outputs(teacher, places, batch)


def _outputs(model: nn.Module, places: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """Run a batch and return the first tensor in the output of each named module."""
    outputs: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[name] = output_tensor(output)

        return after

    with contextlib.ExitStack() as hooks:
        for name in places:
            hooks.callback(model.get_submodule(name).register_forward_hook(see(name)).remove)
        model(*batch.args, **batch.kwargs)
    return {name: outputs[name] for name in places}


@contextlib.contextmanager
def _trained(model: nn.Module, layers: Sequence[MaskedLayer]) -> Iterator[list[nn.Parameter]]:
    """Let gradients reach the tuned parameters and no others, and yield these."""
    weights = {id(layer.weight) for layer in layers}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = [parameter for parameter, _ in flags if id(parameter) in weights or parameter.dim() <= 1]
    grads = [parameter.grad for parameter, _ in flags]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield chosen
    finally:
        for (parameter, flag), grad in zip(flags, grads, strict=True):
            parameter.grad = grad
            parameter.requires_grad_(flag)


def _shuffled(n: int, seed: int) -> Iterator[int]:
    """Draw every number below n once, then again in another order, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator, device="cpu").tolist()


def _check_budget(steps: int | None, seconds: float | None, lr: float) -> None:
    if steps is None and seconds is None:
        raise ValueError("recover needs a budget: steps, seconds, or both")
    if (
        (steps is not None and steps < 1)
        or (seconds is not None and not 0 < seconds < math.inf)
        or not 0 < lr < math.inf
    ):
        raise ValueError(f"steps, seconds and lr must be positive and finite, got {steps}, {seconds} and {lr}")

"""What is worth keeping, and what the kept weights become.

A method is a function `(weight) -> scores`, larger = more worth keeping; or `(weight, *, seed)` if it draws random
numbers; or `(weight, *, gram)` if it looks at calibration data, whose Gram matrix (in, in) it is then given; or with a
keyword of TRAINING_STATISTICS if it goes by what a training shows. Scores are a floating tensor of the weight's
shape. To use your own, pass the function itself: `prune(model, 0.5, method=mine)`.

A solver chooses the mask and changes the kept weights in one go; it always needs data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparsify.masking.methods.alps import alps
from sparsify.masking.methods.grasp import grasp
from sparsify.masking.methods.magnitude import magnitude
from sparsify.masking.methods.movement import movement
from sparsify.masking.methods.random import random
from sparsify.masking.methods.refit import refit
from sparsify.masking.methods.snip import snip
from sparsify.masking.methods.sparsegpt import sparsegpt
from sparsify.masking.methods.wanda import wanda

__all__ = [
    "BY_ROW",
    "CALIBRATED",
    "METHODS",
    "SOLVERS",
    "TRAINING_METHODS",
    "TRAINING_STATISTICS",
    "Method",
    "Solver",
    "refit",
    "score",
]

Method = Callable[..., Tensor]
Solver = Callable[..., tuple[Tensor, Tensor]]

METHODS: dict[str, Method] = {"magnitude": magnitude, "random": random}

#: Methods that need calibration data.
CALIBRATED: dict[str, Method] = {"wanda": wanda}

#: Methods that need a training, and what they may ask it for, by the name of their keyword: of the weight's shape each.
TRAINING_METHODS: dict[str, Method] = {"movement": movement, "snip": snip, "grasp": grasp}
TRAINING_STATISTICS: dict[str, str] = {
    "movement": "the sum over all steps so far of -weight * gradient, masked weights included",
    "curvature": "the Hessian of the loss times its gradient",
}

#: Methods whose scores are compared within a row only.
BY_ROW = ("wanda",)

#: `(weight, mask, n_removed, pattern, *, gram) -> weight, mask`; see `sparsegpt`.
SOLVERS: dict[str, Solver] = {"sparsegpt": sparsegpt, "alps": alps}


def needs_data(method: str | Method) -> bool:
    """Say whether a method looks at the Gram matrix of a layer's inputs."""
    return method in SOLVERS or method in CALIBRATED or (callable(method) and _takes(method, "gram"))


def resolve_method(method: str | Method) -> Method:
    """Return the function behind the name of a method that gives scores; a function is returned as it is."""
    if callable(method):
        return method
    if method in SOLVERS:
        raise ValueError(
            f"method {method!r} needs calibration data: sparsify.prune(model, ..., method={method!r}, data=...)"
        )
    known = METHODS | CALIBRATED | TRAINING_METHODS
    if method not in known:
        raise ValueError(f"method {method!r} is none of: {', '.join((*known, *SOLVERS))}; or pass your own function")
    return known[method]


def takes_seed(method: Method) -> bool:
    """Say whether a method draws random numbers, that is, has a `seed` parameter."""
    return _takes(method, "seed")


def required_statistics(method: str | Method) -> set[str]:
    """Return which of TRAINING_STATISTICS a method asks for."""
    if method in SOLVERS:
        return set()
    return {key for key in TRAINING_STATISTICS if _takes(resolve_method(method), key)}


def _takes(method: Method, parameter: str) -> bool:
    try:
        return parameter in inspect.signature(method).parameters
    except ValueError:  # torch.abs and its like are written in C and have no signature
        return False


def score(
    name: str,
    weight: Tensor,
    method: str | Method,
    seed: int | None = None,
    gram: Tensor | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Score the weight (out, in) of the layer called `name`; gram (in, in) is for methods that look at data.

    statistics is for those that go by what a training shows (TRAINING_STATISTICS).

    A seed is mixed with the name, so that layers of one shape do not get one mask. Raises ValueError if a seed is given
    to a method that draws nothing, if data or evidence is missing, if the weight or a score is not finite, or if the
    scores have another shape.
    """
    chosen = resolve_method(method)
    label = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    where = f"{name}: " if name else ""
    check_finite(name, weight)
    options: dict[str, object] = {}
    if _takes(chosen, "gram"):
        if gram is None:
            raise ValueError(f"{where}method {label!r} needs calibration data: sparsify.prune(model, ..., data=...)")
        options["gram"] = gram
    for key in sorted(required_statistics(chosen)):
        if key not in (statistics or {}):
            raise ValueError(
                f"{where}method {label!r} needs {TRAINING_STATISTICS[key]}; follow a recipe with sparsify.Pruner, "
                "after at least one step of training or with its argument 'loss'"
            )
        options[key] = (statistics or {})[key]
    if takes_seed(chosen):
        options["seed"] = mix_seed(seed or 0, name)
    elif seed is not None:
        raise ValueError(f"seed={seed} has no effect with method {label!r}, which draws no random numbers")
    scores = chosen(weight.detach(), **options)
    if scores.shape != weight.shape or not scores.is_floating_point():
        raise ValueError(
            f"{where}method {label!r} must return floating scores of shape {tuple(weight.shape)}, "
            f"got {scores.dtype} {tuple(scores.shape)}"
        )
    if not torch.isfinite(scores).all():
        raise ValueError(f"{where}method {label!r} returned a score that is NaN or Inf")
    return scores


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError, naming the layer, if a weight has no data or holds NaN or Inf."""
    where = f"{name}: " if name else ""
    if weight.is_meta:
        raise ValueError(f"{where}the weight is on the meta device and has no data; load the model's weights first")
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{where}the weight holds NaN or Inf; mend it"
            + (f", or leave the layer out with exclude=[{name!r}]" if name else "")
        )


def check_memory(name: str, weight: Tensor) -> None:
    """Raise ValueError, naming the layer, if entries of a weight share memory, so that none can be set alone."""
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        where = f"{name}: " if name else ""
        raise ValueError(
            f"{where}entries of the weight share memory (it is an expanded tensor), so that none can be removed alone; "
            "give the layer a weight of its own: nn.Parameter(weight.detach().clone())"
        )


def mix_seed(seed: int, name: str) -> int:
    """Derive one seed per layer (FNV-1a over the name): the same in every process and on every machine."""
    mixed = (0xCBF29CE484222325 ^ seed) % 2**64
    for byte in name.encode():
        mixed = ((mixed ^ byte) * 0x100000001B3) % 2**64
    return mixed % 2**63

"""The tables of methods and solvers by name, and the needs of each: data, training, a seed.

A method is a function `(weight) -> scores`, larger = more worth keeping. It asks for more by keywords of its signature:
seed: one for its random numbers
gram: the Gram matrix (in, in) of the layer's inputs, from calibration data
one of TRAINING_STATISTICS: sums over the steps of a training
Scores are a floating tensor of the weight's shape. To use your own, pass the function itself:
`prune(model, 0.5, method=mine)`.

A solver chooses the mask and changes the kept weights in one go; it always needs data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from sparsify.masking.methods.alps import alps
from sparsify.masking.methods.grasp import grasp
from sparsify.masking.methods.magnitude import magnitude
from sparsify.masking.methods.movement import movement
from sparsify.masking.methods.random import random
from sparsify.masking.methods.snip import snip
from sparsify.masking.methods.sparsegpt import sparsegpt
from sparsify.masking.methods.wanda import wanda

Method = Callable[..., Tensor]
Solver = Callable[..., tuple[Tensor, Tensor]]

METHODS: dict[str, Method] = {"magnitude": magnitude, "random": random}

#: Methods that need calibration data.
CALIBRATED: dict[str, Method] = {"wanda": wanda}

#: Methods that need a training, and the statistics that it sums, by keyword: each of the weight's shape.
TRAINING_METHODS: dict[str, Method] = {"movement": movement, "snip": snip, "grasp": grasp}
TRAINING_STATISTICS: dict[str, str] = {
    "movement": "the sum over all steps so far of -weight * gradient, masked weights included",
    "curvature": "the Hessian of the loss times its gradient",
}

#: Methods with scores compared within a row only.
BY_ROW = ("wanda",)

#: Calibrated methods that look at the diagonal of the Gram matrix only: the sizes of the inputs.
BY_DIAGONAL = ("wanda",)

#: `(weight, mask, n_removed, pattern, *, gram) -> weight, mask`; see `sparsegpt`.
SOLVERS: dict[str, Solver] = {"sparsegpt": sparsegpt, "alps": alps}


def resolve_method(method: str | Method) -> Method:
    """Return the function of a method with scores, by its name; a function is returned as it is."""
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


def needs_data(method: str | Method) -> bool:
    """Return whether a method takes the Gram matrix of a layer's inputs."""
    return method in SOLVERS or takes(method, "gram")


def needs_products(method: str | Method) -> bool:
    """Return whether a method looks at products of two inputs, off the diagonal of the Gram matrix."""
    return needs_data(method) and method not in BY_DIAGONAL


def takes_seed(method: str | Method) -> bool:
    """Return whether a method draws random numbers."""
    return takes(method, "seed")


def required_statistics(method: str | Method) -> set[str]:
    """Return the names of a method's TRAINING_STATISTICS."""
    return {key for key in TRAINING_STATISTICS if takes(method, key)}


def takes(method: str | Method, keyword: str) -> bool:
    """Return whether a method has a parameter of this name; a solver has none of them."""
    if method in SOLVERS:
        return False
    function = resolve_method(method)
    try:
        return keyword in inspect.signature(function).parameters
    except ValueError:  # torch.abs and its like are written in C and have no signature
        return False


def method_label(method: str | Method) -> str:
    """Return the name of a method, for messages."""
    return method if isinstance(method, str) else str(getattr(method, "__name__", repr(method)))

"""torch's fused operators of recurrent layers, product by product, for weights that are views (weight_view.py).

The input's products are those of all steps at once; each step then multiplies the hidden state alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: The state of a step: (h, c) of an LSTM, else (h,).
_State = tuple[Tensor, ...]


#: Multiply rows with a weight, and add a bias.
_Product = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Weights:
    """The products of one layer in one direction, or of a cell; project makes an LSTM's output its hidden state."""

    input: _Product
    hidden: _Product
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    project: _Product | None = None


def _lstm(given: Tensor, state: _State, weights: _Weights) -> _State:
    """Take a step of an LSTM; given: the products of inputs and both biases, (batch, 4 x hidden), for i, f, g and o."""
    gates, size = _sum(given, state[0], weights), state[1].shape[1]
    if torch.is_grad_enabled():
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    else:  # fewer operators, each a microsecond, and less new memory
        gates.narrow(1, 0, 2 * size).sigmoid_()
        c = gates.narrow(1, size, size) * state[1]
        c.addcmul_(gates.narrow(1, 0, size), gates.narrow(1, 2 * size, size).tanh_())
        h = c.tanh().mul_(gates.narrow(1, 3 * size, size).sigmoid_())
    return (h if weights.project is None else weights.project(h, None)), c


def _sum(given: Tensor, h: Tensor, weights: _Weights) -> Tensor:
    """Return given + the products of a hidden state, in new memory; for one row the kernel adds."""
    if len(h) == 1 and not torch.is_grad_enabled():
        return weights.hidden(h, given[0])
    return weights.hidden(h, None) + given


def _gru(given: Tensor, state: _State, weights: _Weights) -> _State:
    """Take a step of a GRU; given: the products of inputs and their bias, (batch, 3 x hidden), for r, z and n."""
    (h,) = state
    products = weights.hidden(h, weights.hidden_bias)
    size = h.shape[1]
    r, z = (given[:, : 2 * size] + products[:, : 2 * size]).sigmoid().chunk(2, 1)
    n = (given[:, 2 * size :] + r * products[:, 2 * size :]).tanh()
    return (n + z * (h - n),)


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, _State, _Weights], _State]:
    def step(given: Tensor, state: _State, weights: _Weights) -> _State:
        return (activation(_sum(given, state[0], weights)),)

    return step


#: The step of each operator, and True if the hidden state's bias stands inside of it.
_STEPS: dict[str, tuple[Callable[[Tensor, _State, _Weights], _State], bool]] = {
    "lstm": (_lstm, False),
    "gru": (_gru, True),
    "rnn_tanh": (_rnn(torch.tanh), False),
    "rnn_relu": (_rnn(torch.relu), False),
}

#: The operators of layers and of cells, each with the name of its step.
LAYERS: dict[Any, str] = {getattr(torch, name): name for name in _STEPS}
CELLS: dict[Any, str] = {getattr(torch, f"{name}_cell"): name for name in _STEPS}


def recurrent(func: Any, args: Sequence[Any]) -> Any:
    """Compute what an operator of LAYERS or CELLS does with these arguments.

    Under autocast the products are in the weights' own dtype, and the results in autocast's.
    """
    device = args[0].device.type
    if not torch.is_autocast_enabled(device):
        return _cell(CELLS[func], *args) if func in CELLS else _layer(LAYERS[func], *args)
    with torch.autocast(device, enabled=False):
        results = recurrent(func, _as_dtype(args, _dtype_of(args)))
    return _as_dtype(results, torch.get_autocast_dtype(device))


def _cell(name: str, input: Tensor, hx: Any, *tensors: Tensor | None) -> Any:
    """Take one step; returns the new hidden state, for an LSTM (h, c)."""
    state = tuple(hx) if name == "lstm" else (hx,)
    input_weight, hidden_weight, *biases = tensors
    assert input_weight is not None
    assert hidden_weight is not None
    weights = _Weights(_product(input_weight), _product(hidden_weight), *biases)  # type: ignore[arg-type]
    state = _STEPS[name][0](_products(name, input, weights), state, weights)
    return state if name == "lstm" else state[0]


def _layer(name: str, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Run all layers over a sequence; returns outputs and final states, these (layers x directions, batch, size)."""
    packed = not args[0].is_floating_point() if isinstance(args[0], Tensor) else False
    batch_sizes, (hx, tensors, biased, n_layers, dropout, train, both_ways, *batch_first) = (
        (args[0].tolist(), args[1:]) if packed else (None, args)
    )
    if batch_sizes is None:
        input = input.transpose(0, 1) if batch_first[0] else input
        n_steps, n_batch = input.shape[:2]
        if n_steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        batch_sizes, input = [n_batch] * n_steps, input.reshape(n_steps * n_batch, -1)
    initial = list(zip(*(hx if name == "lstm" else (hx,)), strict=True))  # by layer and direction
    finals: list[_State] = []
    of_layers = _weights(tensors, biased, len(initial), projects=name == "lstm")
    for number in range(n_layers):
        if number and dropout and train:
            input = F.dropout(input, dropout, True)
        outputs = []
        for backwards in (False, True)[: 1 + both_ways]:
            output, final = _run(name, input, batch_sizes, initial[len(finals)], next(of_layers), backwards)
            outputs.append(output)
            finals.append(final)
        input = torch.cat(outputs, 1) if both_ways else outputs[0]
    states = [torch.stack(parts) for parts in zip(*finals, strict=True)]
    if not packed:
        input = input.view(n_steps, n_batch, -1)
        input = input.transpose(0, 1) if batch_first[0] else input
    return input, *states


def _weights(tensors: Sequence[Tensor], biased: bool, n_layers: int, *, projects: bool) -> Iterator[_Weights]:
    """Yield the weights of one layer and direction after another, from torch's list."""
    n_each = len(tensors) // n_layers
    for start in range(0, len(tensors), n_each):
        own = list(tensors[start : start + n_each])
        project = _product(own.pop()) if projects and n_each in (3, 5) else None
        biases = own[2:] if biased else []
        yield _Weights(_product(own[0]), _product(own[1]), *biases, project=project)  # type: ignore[arg-type, misc]


def _run(
    name: str, input: Tensor, batch_sizes: Sequence[int], initial: _State, weights: _Weights, backwards: bool
) -> tuple[Tensor, _State]:
    """Run one direction of one layer over the steps in `input`, (all steps' rows, features); sequences end early."""
    step = _STEPS[name][0]
    given = _products(name, input, weights).split(list(batch_sizes))
    outputs: list[Tensor] = []
    ended: list[_State] = []
    state = tuple(part[: batch_sizes[-1 if backwards else 0]] for part in initial)
    for number in reversed(range(len(given))) if backwards else range(len(given)):
        n_rows, n_before = batch_sizes[number], len(state[0])
        if n_rows > n_before:  # backwards: more sequences begin
            state = tuple(torch.cat([part, first[n_before:n_rows]]) for part, first in zip(state, initial, strict=True))
        elif n_rows < n_before:
            ended.append(tuple(part[n_rows:] for part in state))
            state = tuple(part[:n_rows] for part in state)
        state = step(given[number], state, weights)
        outputs.append(state[0])
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return torch.cat(outputs[::-1] if backwards else outputs), state


def _products(name: str, input: Tensor, weights: _Weights) -> Tensor:
    """Return the products of inputs, with all biases that can be added before the step."""
    bias = weights.input_bias
    if bias is not None and weights.hidden_bias is not None and not _STEPS[name][1]:
        bias = bias + weights.hidden_bias
    return weights.input(input, bias)


def _product(weight: Tensor) -> _Product:
    """Return the product with a weight: for a view its own, without a look-up in each step."""
    own: _Product | None = weight.__dict__.get("run_sparse")
    return own if own is not None else lambda x, bias: F.linear(x, weight, bias)


def _dtype_of(args: Any) -> torch.dtype:
    """Return the dtype of the weights among an operator's arguments."""
    tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor)]
    return next(t.dtype for t in reversed(tensors) if t.dim() == 2 and type(t) is not Tensor)


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return a value with every plain floating-point tensor in it in a dtype."""
    if isinstance(value, (tuple, list)):
        return type(value)(_as_dtype(part, dtype) for part in value)
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.is_floating_point()
    return value.to(dtype) if plain else value

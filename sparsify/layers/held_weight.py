"""A weight that the code of the module around it reads, such as the matrices of an LSTM: dense, masked and packed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.kernels.csr import csr_to_dense
from sparsify.layers.csr_linear import CSRLinear
from sparsify.layers.masked import MaskedLayer
from sparsify.layers.torch_layer import TorchLayer
from sparsify.layers.weight_view import StackView, WeightView


class HeldWeight(nn.Module):
    """A weight read by the code around it: (out_features, in_features), or (n, out_features, in_features).

    transposed: True for a weight stored (..., in_features, out_features).
    one_by_one: True if that code multiplies rows with one matrix at a time, as those of an LSTM and of experts do; then
        the weight can be a view with products of its own, and be packed. Code of einsum needs the tensor.
    """

    weight: Tensor
    stack: tuple[int, ...]
    transposed: bool
    one_by_one: bool

    def __init__(self, weight: nn.Parameter, *, transposed: bool = False, one_by_one: bool = False) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.stack, self.transposed, self.one_by_one = tuple(weight.shape[:-2]), transposed, one_by_one

    def forward(self, input: Tensor, number: int = 0, bias: Tensor | None = None) -> Tensor:
        """Multiply rows (..., in_features) with the matrix of this number."""
        return _product(input, self.weight, number, bias, self.__dict__)

    def extra_repr(self) -> str:
        """Tell the shape of the weight."""
        return "x".join(map(str, self.weight.shape))


class SparseHeldWeight(TorchLayer, HeldWeight):
    """A HeldWeight under a mask; see `MaskedLayer`. The rows of the matrix are those of one matrix after another."""

    dense_type = HeldWeight
    setting_names = ("stack", "transposed", "one_by_one")
    has_bias = False
    several_calls = True

    @classmethod
    def matrix_of(cls, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return all matrices of a weight as one, (n x out_features, in_features)."""
        rows = weight.mT if settings["transposed"] else weight
        return rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])

    @classmethod
    def weight_of(cls, matrix: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return such a matrix as the weight."""
        n_rows = matrix.shape[0] // max(math.prod(settings["stack"]), 1)
        weight = matrix.reshape(*settings["stack"], n_rows, matrix.shape[1])
        return weight.mT if settings["transposed"] else weight

    @property
    def multiplies_rows(self) -> bool:
        """True if calls of the layer show the rows that the weight is multiplied with."""
        return self.one_by_one

    @property
    def input_groups(self) -> int:
        """The number of matrices, each with rows of its own."""
        return math.prod(self.stack) if self.one_by_one else 1

    def group_of_call(self, args: tuple[Any, ...]) -> int | None:
        """Return the number of the matrix that a call multiplies with, None for a single one."""
        return int(args[1]) if self.input_groups > 1 and len(args) > 1 else None

    def forward(
        self, input: Tensor, number: int = 0, bias: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Multiply rows (..., in_features) with the matrix of this number; weight: that under its mask, if known."""
        return _product(input, self.forward_weight() if weight is None else weight, number, bias, self.__dict__)

    def seen_by_hooks(self) -> bool:
        """Return whether the code around should multiply by calls of this layer, as hooks wait for them."""
        return self.one_by_one and bool(self._forward_pre_hooks or self._forward_hooks)

    def view(self, weight: Tensor) -> Tensor:
        """Return the weight as a view with products that are calls of this layer."""

        def multiply(number: int, input: Tensor, bias: Tensor | None) -> Tensor:
            output: Tensor = self(input, number, bias, weight)
            return output

        return _view(weight.shape, weight, multiply, lambda: weight, self.transposed)


class CSRHeldWeight(CSRLinear):
    """A HeldWeight over a packed weight, all its matrices in one, (n x out_features, in_features)."""

    masked_type: type[MaskedLayer] = SparseHeldWeight

    @classmethod
    def packs(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether the code around multiplies with one matrix at a time."""
        return bool(settings["one_by_one"])

    def forward(self, input: Tensor, number: int = 0, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Multiply rows (..., in_features) with the matrix of this number."""
        n_rows = self.out_features // max(self.n_matrices, 1)
        rows = (0, -1) if self.n_matrices == 1 else (number * n_rows, (number + 1) * n_rows)
        return self._multiply(input, bias, "none", rows)

    @property
    def n_matrices(self) -> int:
        """The number of matrices in the weight."""
        return math.prod(self._settings["stack"])

    @property
    def weight(self) -> Tensor:
        """The weight as the code around reads it: a view, sparse in products; dense in a compiled graph."""
        if torch.compiler.is_compiling():
            return self._unpack()
        settings = self._settings
        shape = (*settings["stack"], self.out_features // max(self.n_matrices, 1), self.in_features)
        shape = (*shape[:-2], shape[-1], shape[-2]) if settings["transposed"] else shape
        return _view(
            shape, self.values.new_empty(0, dtype=self.float_dtype), self._call, self._unpack, settings["transposed"]
        )

    @property
    def _settings(self) -> Mapping[str, Any]:
        assert self.dense_settings is not None
        return self.dense_settings

    def _call(self, number: int, input: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = self(input, number, bias)
        return output

    def _unpack(self) -> Tensor:
        return SparseHeldWeight.weight_of(csr_to_dense(self.csr, self.shape)[0], self._settings)


def _product(input: Tensor, weight: Tensor, number: int, bias: Tensor | None, settings: Mapping[str, Any]) -> Tensor:
    matrix = weight.reshape(-1, *weight.shape[-2:])[number] if settings["stack"] else weight
    return F.linear(input, matrix.mT if settings["transposed"] else matrix, bias)


def _view(shape: tuple[int, ...], like: Tensor, multiply: Any, unpack: Any, transposed: bool) -> Tensor:
    """Make the view of a weight, or of a stack of weights, of a shape as the code around it sees it.

    multiply(number, x, bias): multiply with the matrix of this number. unpack(): return the dense weight.
    """
    size = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])

    def matrix(number: int) -> WeightView:
        def dense() -> Tensor:
            whole: Tensor = unpack()
            own = whole.reshape(-1, *whole.shape[-2:])[number] if len(shape) > 2 else whole
            return own.mT if transposed else own

        view = WeightView.make(size, like.dtype, like.device, partial(multiply, number), dense)
        return view.turn() if transposed else view

    return matrix(0) if len(shape) == 2 else StackView.make(shape, like.dtype, like.device, matrix, unpack)

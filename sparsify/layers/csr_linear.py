"""CSRLinear: an exported linear layer. Only the kept weights are in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels import linear, mlp_op
from sparsify.kernels.cpu.mlp import Layer
from sparsify.layers.deferred import DeferredOutput
from sparsify.layers.inference_mode import in_plain_inference
from sparsify.layers.masked import MaskedLayer
from sparsify.layers.packed import PackedLayer
from sparsify.layers.sparse_linear import SparseLinear
from sparsify.layers.tracing import call_node, tracer_of
from sparsify.layers.weight_view import WeightView


class CSRLinear(PackedLayer):
    """A linear layer over a packed weight; `PackedLayer` describes its buffers.

    Under autocast the layer computes in its own dtype and returns autocast's.

    >>> layer = CSRLinear.from_sparse(SparseLinear(8, 4, 0.75, seed=1))
    >>> layer.n_kept, layer.col.dtype, layer(torch.ones(2, 8)).shape
    (8, torch.uint8, torch.Size([2, 4]))
    """

    masked_type: type[MaskedLayer] = SparseLinear

    def forward(self, input: Tensor, rows: tuple[int, int] = (0, -1)) -> Tensor:
        """Apply the layer to (..., in_features); returns (..., out_features), or the outputs rows[0] to rows[1] - 1."""
        if type(input) is not Tensor and (tracer := tracer_of(input)) is not None and tracer.root is not self:
            return call_node(self, tracer, input, rows=rows)  # type: ignore[no-any-return]
        if type(input) is DeferredOutput:
            if rows == (0, -1) and (before := self._joinable(input)) is not None:
                return self._join(before, input)
            input = input.settle()
        # From _parameters: nn.Module's own look-up of `self.bias` takes a microsecond.
        bias = self._parameters["bias"]
        if self.followed_by != "none" and self._may_defer(input, input.dim() - 1, self.in_features) and rows == (0, -1):
            return DeferredOutput.make(
                self,
                lambda activation: self._multiply(input, bias, activation),
                input,
                (*input.shape[:-1], self.out_features),
            )
        return self._multiply(input, bias, self.activation, rows)

    def _joinable(self, output: DeferredOutput) -> CSRLinear | None:
        """Return the layer before if one call of a kernel for it, its activation and this layer is faster than two."""
        before, input = output.layer, output.input
        if output.value is not None or output.activation == "none" or not isinstance(before, CSRLinear):
            return None
        tokens = input.numel() // max(before.in_features, 1)
        may_join = (
            before.form == self.form
            and mlp_op.is_worthwhile(self.form, tokens, before.in_features + self.out_features)
            and in_plain_inference()
        )
        return before if may_join else None

    def _join(self, before: CSRLinear, output: DeferredOutput) -> Tensor:
        """Apply the layer before, its activation and this layer to what that layer got; defer this if worth it."""
        input, bias, first = output.current_input(), self._parameters["bias"], before._in_mlp(output.activation)

        def compute(activation: str) -> Tensor:
            y = mlp_op.mlp(input, first, self._in_mlp(activation), self.form)
            return self._multiply(output.settle(), bias, activation) if y is None else y

        if self.followed_by != "none" and self._may_defer(input, input.dim() - 1, before.in_features):
            return DeferredOutput.make(None, compute, input, (*input.shape[:-1], self.out_features))
        return compute(self.activation)

    def _in_mlp(self, activation: str) -> Layer:
        return mlp_op.layer(self.tensors, self.shape, self._parameters["bias"], activation)

    def _multiply(
        self, input: Tensor, bias: Tensor | None, activation: str = "none", rows: tuple[int, int] = (0, -1)
    ) -> Tensor:
        if type(input) is not Tensor and (tracer := tracer_of(input)) is not None:
            whole = (input, self.tensors, self.form, self.shape, bias, activation, rows)
            return tracer.create_proxy("call_function", linear, whole, {})  # type: ignore[return-value]
        if input.is_nested:
            return self._multiply_nested(input, bias, activation, rows)
        autocast = self._autocast_dtype(input)
        if autocast is None:
            if self.own_dtype is not None:
                self._check_dtype(input)
            return linear(input, self.tensors, self.form, self.shape, bias, activation, rows)
        input = input.to(self.float_dtype)
        return linear(input, self.tensors, self.form, self.shape, bias, activation, rows).to(autocast)

    def _multiply_nested(self, input: Tensor, bias: Tensor | None, activation: str, rows: tuple[int, int]) -> Tensor:
        """Multiply all sequences of a nested tensor as one."""
        sequences = input.unbind()
        output = self._multiply(torch.cat(sequences), bias, activation, rows)
        parts = torch.split(output, [len(sequence) for sequence in sequences])
        return torch.nested.as_nested_tensor(list(parts), layout=input.layout)

    @property
    def weight(self) -> Tensor:
        """The weight, for code written for nn.Linear: sparse in F.linear, unpacked in any other use.

        A compiled graph always gets the dense weight.
        """
        if torch.compiler.is_compiling():
            return self._unpack()
        return WeightView.make(self.shape, self.float_dtype, self.values.device, self._multiply, self._unpack)

"""PackedLayer: the contract of every exported layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.kernels import FORMS, form_for, pack, part_names, supports, unpack, unpack_as
from sparsify.kernels.cpu.pages import use_huge_pages
from sparsify.kernels.csr import CSR, check_csr, csr_to_dense, dense_to_csr
from sparsify.kernels.forms import SCALE
from sparsify.kernels.int8 import Rounded, check_quantized, quantize
from sparsify.layers.deferred import may_defer
from sparsify.layers.inference_mode import making_tensors
from sparsify.layers.masked import MaskedLayer
from sparsify.layers.records import FormChoice, LayerResult, Rounding
from sparsify.layers.tracing import refuse_script


class PackedLayer(nn.Module):
    """The contract of a layer over a packed weight (out_features, in_features), in plain buffers of one form.

    In the form "csr": `crow` int32 (out_features + 1), `col` uint8, uint16 or int32 (n_kept), the narrowest possible,
    `values` (n_kept) in the layer's dtype. The other forms have the same weight as `index` and `values`, packed for the
    native CPU kernels ("panel", "bitmask", "gather", "sell") or for GPU kernels ("tiles", "narrow", "blocks", "2:4").
    Where no kernel of its form runs (another device, float64 on the CPU) the layer changes by itself to a form with
    kernels there, or to "csr", and back. A state_dict always has crow, col and values.

    A quantized layer has int8 `values` and besides `weight_scale`, float32 (out_features): a weight is their product.
    Its own dtype, of inputs, outputs and bias, is then in `own_dtype`, and moves with `.half()` and the like.

    `bias` is a Parameter or None, `activation` is applied to every output. Plain tensors survive deepcopy, pickle,
    state_dict, `.to()`, torch.compile and torch.export. The gradient reaches the input and the bias, not the values:
    train a masked layer instead. `masked_type` is the type of the masked layer before packing, and of the result of
    `to_sparse`.

    A subclass computes with `tensors` in its forward.
    """

    bias: nn.Parameter | None
    #: The buffer of every form with the kept weights: in the layer's dtype, or int8.
    values: Tensor
    #: The dtype of inputs, outputs and bias, if the values are int8; None if the values have it.
    own_dtype: torch.dtype | None = None
    in_features: int
    out_features: int
    n_kept: int
    #: The form in use, and the form wanted where its kernels run.
    form: str
    wanted_form: str
    activation: str
    masked_type: type[MaskedLayer]
    #: The activation after the layer in the module around it, to be computed together with the layer's output.
    followed_by: str = "none"
    #: Whether only a linear layer reads what follows, so that both layers can be one call.
    feeds_linear: bool = False
    #: The choice of the form, if `export` or `load` made the layer.
    choice: FormChoice | None = None
    #: The change by rounding to int8, if `export` was asked for it.
    rounding: Rounding | None = None
    #: The result of the masked layer's pruning on data.
    pruning_result: LayerResult | None = None
    #: The settings of the dense layer beside its weight and bias (MaskedLayer.settings_of); None: the plain ones.
    dense_settings: Mapping[str, Any] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        csr: CSR,
        bias: nn.Parameter | None = None,
        *,
        scale: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        form: str = "csr",
        activation: str = "none",
        masked_type: type[MaskedLayer] | None = None,
        dense_settings: Mapping[str, Any] | None = None,
    ) -> None:
        """csr: the kept weights; int8 ones come with their `scale`, and the `dtype` of the layer's inputs."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.n_kept = csr.values.numel()
        self.wanted_form = self.form = form
        self.activation = activation
        if masked_type is not None:
            self.masked_type = masked_type
        if dense_settings:
            self.dense_settings = dict(dense_settings)
        self.own_dtype = None if scale is None else dtype
        self._set_tensors(form, pack(form, csr, self.shape, scale, self.own_dtype))
        self.register_parameter("bias", bias)

    @classmethod
    def packs(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether layers of this type can stand for one with these settings (MaskedLayer.settings_of)."""
        return True

    @classmethod
    def worth_measuring(cls, form: str, settings: Mapping[str, Any]) -> bool:
        """Return whether a form may be the fastest for such a layer; others are right, but for no use but memory."""
        return True

    @classmethod
    def from_sparse(
        cls, layer: MaskedLayer, *, form: str = "csr", quantized: bool = False, rounded: Rounded | None = None
    ) -> Self:
        """Pack the kept weights of a masked layer (kept zeros included), rounded to int8 if `quantized`.

        rounded: int8 values to take instead of the nearest ones. The bias is shared.
        """
        csr = dense_to_csr(layer.weight_matrix, layer.matrix(layer.mask))
        out_features, in_features = layer.shape
        options: dict[str, Any] = {"form": form, "masked_type": type(layer), "dense_settings": layer.settings_of(layer)}
        if quantized:
            if rounded is None:
                csr, options["scale"] = quantize(csr, out_features)
            else:
                csr, options["scale"] = csr._replace(values=rounded.values), rounded.scale
            options["dtype"] = layer.weight.dtype
        return cls(in_features, out_features, csr, layer._parameters.get("bias"), **options).train(layer.training)

    def to_sparse(self) -> MaskedLayer:
        """Unpack into a masked layer, to be trained; the bias is shared, an activation left out."""
        weight, mask = csr_to_dense(self.csr, self.shape)
        return self.masked_type.from_matrix(weight, mask, self.bias, self.dense_settings).train(self.training)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight, (out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the packed weight, in the order of FORMS, and the scale behind them if there is one."""
        buffers = self._buffers
        names = FORMS[self.form] if self.own_dtype is None else part_names(self.form, quantized=True)
        return tuple([buffers[name] for name in names])  # type: ignore[misc]

    @property
    def float_dtype(self) -> torch.dtype:
        """The layer's own dtype, of its inputs, outputs and bias."""
        return self.values.dtype if self.own_dtype is None else self.own_dtype

    @property
    def csr(self) -> CSR:
        """The weight as row pointers, column indices and values in the layer's dtype, whatever the form."""
        return unpack_as(self.float_dtype, self.form, self.tensors, self.shape)

    @property
    def stored_csr(self) -> CSR:
        """The weight as `csr`, with int8 values as they are."""
        return unpack(self.form, self.tensors, self.shape)

    def _unpack(self) -> Tensor:
        return csr_to_dense(self.csr, self.shape)[0]

    @property
    def sparsity(self) -> float:
        """The fraction of removed weights (0 for a layer without weights)."""
        total = self.in_features * self.out_features
        return (total - self.n_kept) / total if total else 0.0

    def to_csr(self) -> Tensor:
        """Return the kept weights as a torch sparse CSR tensor (a copy)."""
        crow, col, values = self.csr
        return torch.sparse_csr_tensor(crow, col.to(torch.int32), values.clone(), self.shape, check_invariants=False)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does, with its sparsity."""
        form = "" if self.form == "csr" else f", form={self.form!r}"
        form += "" if self.own_dtype is None else ", values=int8"
        activation = "" if self.activation == "none" else f", activation={self.activation!r}"
        followed_by = "" if self.followed_by == "none" else f", followed_by={self.followed_by!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={self.sparsity:.4g}{form}{activation}{followed_by}"
        )

    def _autocast_dtype(self, input: Tensor) -> torch.dtype | None:
        """Return the output's dtype under autocast (products are in the layer's own dtype), None outside autocast."""
        device = "cpu" if input.is_cpu else input.device.type  # the latter costs a third of a microsecond
        if device == "meta" or not torch.is_autocast_enabled(device):
            return None
        castable = input.is_floating_point() and input.dtype != torch.float64
        return torch.get_autocast_dtype(device) if castable else None

    def _may_defer(self, input: Tensor, dim: int, n_features: int) -> bool:
        """Return whether the output for an input with so many features in this dimension may be deferred."""
        return (
            type(input) is Tensor
            and not input.is_nested
            and input.dim() > 1
            and self.activation == "none"
            and input.shape[dim] == n_features
            and input.dtype == self.float_dtype
            and may_defer(self, input, input.numel() // max(n_features, 1) * self.out_features)
            and self._autocast_dtype(input) is None
        )

    def _check_dtype(self, input: Tensor) -> None:
        """Raise RuntimeError unless an input has the dtype of a layer with int8 values; operators check any other."""
        if input.dtype != self.own_dtype:
            raise RuntimeError(f"the layer's own dtype is {self.own_dtype}, but the input is {input.dtype}")

    def _part_names(self) -> tuple[str, ...]:
        return part_names(self.form, quantized=self.own_dtype is not None)

    def _without_parts(self) -> dict[str, Tensor | None]:
        """Return the buffers beside the packed weight."""
        return {key: value for key, value in self._buffers.items() if key not in (*FORMS[self.form], SCALE)}

    def _set_tensors(self, form: str, tensors: tuple[Tensor, ...]) -> None:
        self._buffers = self._without_parts()
        self.form = form
        for name, tensor in zip(self._part_names(), tensors, strict=True):
            self.register_buffer(name, tensor)
        self._settle_tensors()

    def _set_csr(self, csr: CSR, scale: Tensor | None) -> None:
        """Take another set of kept weights, in the wanted form if that form runs on their device."""
        self.own_dtype, self.n_kept = None if scale is None else self.float_dtype, csr.values.numel()
        form = form_for(self.wanted_form, csr, self.shape, self.own_dtype)
        self._set_tensors(form, pack(form, csr, self.shape, scale, self.own_dtype))

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which asks each module for this first."""
        refuse_script()

    def _settle_tensors(self) -> None:
        """Replace inference tensors by plain ones, and have huge pages under new ones.

        torch does not count the changes of inference tensors.
        """
        with making_tensors():
            for name in self._part_names():
                tensor = self._buffers[name]
                if tensor is not None and tensor.is_inference():
                    self._buffers[name] = tensor.clone()
        if self.form != "csr":  # whose tensors may be a file's, mapped
            use_huge_pages(self.tensors)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or pickle."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._settle_tensors()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert as any module does, and change to a form that runs there, the wanted one if possible."""
        before, scale = self.values, self._buffers.get(SCALE)
        if self.own_dtype is not None:
            self.own_dtype = fn(torch.empty(0, dtype=self.own_dtype, device=before.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None and (moved := self._buffers[SCALE]) is not None and moved.dtype != scale.dtype:
            self._buffers[SCALE] = scale.to(moved.device)  # scales are float32 whatever the layer is
        self._settle_tensors()
        values, quantized = self.values, self.own_dtype is not None
        if before.is_meta and not values.is_meta:
            # Memory without contents must not pass for a weight.
            self.tensors[0].fill_(-1 if self.form == "csr" else 0)
            return self
        runs = supports(self.form, values.device, self.float_dtype, quantized=quantized)
        settled = self.form == self.wanted_form and runs
        # Some values of "2:4" are bits, not numbers, and lose their meaning in another dtype.
        stale = self.form == "2:4" and values.dtype != before.dtype
        if not values.is_meta and (stale or not settled):
            self._set_csr(self.stored_csr, self._buffers.get(SCALE) if quantized else None)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the weight as CSR in any form, to be loaded on any machine; int8 values with their scale."""
        own, parts = self._buffers, self.stored_csr._asdict()
        if self.own_dtype is not None:
            parts[SCALE] = self._buffers[SCALE]
        self._buffers = self._without_parts()
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._buffers = own
        for name, tensor in parts.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load another set of kept weights for the same layer shape, checked to be a valid CSR weight.

        The layer becomes quantized, or no longer so, as the state is.
        """
        _, _, missing_keys, _, errors = args
        tensors = {name: state_dict.get(prefix + name) for name in (*CSR._fields, SCALE)}
        scale, values = tensors.pop(SCALE), tensors["values"]
        lacks_scale = scale is None and isinstance(values, Tensor) and values.dtype == torch.int8
        missing_keys.extend(prefix + name for name, tensor in tensors.items() if tensor is None)
        missing_keys.extend([prefix + SCALE] * lacks_scale)
        if all(isinstance(tensor, Tensor) for tensor in tensors.values()) and not lacks_scale:
            self._load_csr(CSR(**tensors), scale, prefix, errors)  # type: ignore[arg-type]
        own = {prefix + name for name in (*CSR._fields, SCALE)}
        others = {key: value for key, value in state_dict.items() if key not in own}
        buffers = self._buffers
        self._buffers = self._without_parts()
        try:
            super()._load_from_state_dict(others, prefix, *args)
        finally:
            self._buffers = buffers | self._buffers

    def _load_csr(self, csr: CSR, scale: Tensor | None, prefix: str, errors: list[str]) -> None:
        try:
            check_csr(csr, self.shape)
            if scale is not None:
                check_quantized(csr.values, scale, self.out_features)
        except ValueError as error:
            errors.append(f"{prefix.rstrip('.')}: {error}")
            return
        device = csr.values.device if self.values.is_meta else self.values.device
        crow, col, values = (part.detach().to(device, copy=True) for part in csr)
        values = values if scale is not None else values.to(self.float_dtype)
        self._set_csr(CSR(crow, col, values), None if scale is None else scale.detach().to(device, copy=True))

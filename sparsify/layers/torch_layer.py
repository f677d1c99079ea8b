"""TorchLayer: the part that masked forms of torch's own layers have in common, with torch's settings as attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from sparsify.layers.construct import Layer, layer_from_parameters
from sparsify.layers.masked import MaskedLayer


class TorchLayer(MaskedLayer):
    """A layer of torch under a mask, mixed in before torch's class `dense_type`.

    `setting_names` are the attributes of torch's class beside weight and bias; `has_bias` is False for a class without
    a place for one. A subclass defines `forward`, and `matrix_of` and `weight_of` unless the weight is the matrix.
    """

    dense_type: ClassVar[type[nn.Module]]
    setting_names: ClassVar[tuple[str, ...]]
    has_bias: ClassVar[bool] = True

    @classmethod
    def matrix_of(cls, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return the weight of a layer with these settings as a matrix (out_features, in_features)."""
        return weight

    @classmethod
    def weight_of(cls, matrix: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return a matrix (out_features, in_features) as the weight of a layer with these settings."""
        return matrix

    @classmethod
    def default_settings(cls, matrix: Tensor) -> dict[str, Any]:
        """Return the settings of a plain layer with this matrix as its weight."""
        raise NotImplementedError

    @classmethod
    def from_dense(cls, layer: nn.Module, mask: Tensor | None = None, *, weight: Tensor | None = None) -> Self:
        """Make a layer with the settings and Parameters of torch's layer, or another `weight`.

        mask: of the weight's shape, all True by default; removed weights are set to zero in the Parameter.
        """
        weight = layer._parameters["weight"] if weight is None else weight
        assert weight is not None
        made = cls._around(cls, weight, layer._parameters.get("bias"), cls.settings_of(layer))
        made._keep_all()
        if mask is not None:
            made.set_mask(made.matrix(mask))
        return made.train(layer.training)

    @classmethod
    def from_matrix(
        cls, weight: Tensor, mask: Tensor, bias: nn.Parameter | None, settings: Mapping[str, Any] | None = None
    ) -> Self:
        """Make a layer of a weight and a mask, (out_features, in_features); the bias is shared.

        settings: those of torch's layer (`settings_of`), by default those of a plain one.
        """
        settings = cls.default_settings(weight) if settings is None else settings
        made = cls._around(cls, nn.Parameter(cls.weight_of(weight, settings).contiguous()), bias, settings)
        made._keep_all()
        made.set_mask(mask)
        return made

    @classmethod
    def settings_of(cls, layer: nn.Module) -> dict[str, Any]:
        """Return the settings of a layer, dense or masked."""
        return {name: layer.__dict__[name] for name in cls.setting_names}

    def to_dense(self) -> nn.Module:
        """Make torch's layer around the same Parameters, with the masked weights set to zero."""
        self.clear_masked(self.weight)
        bias = self._parameters.get("bias")
        return self._around(self.dense_type, self.weight, bias, self.settings_of(self)).train(self.training)

    @classmethod
    def _around(cls, kind: type[Layer], weight: Tensor, bias: Tensor | None, settings: Mapping[str, Any]) -> Layer:
        """Make a layer of the class `kind` around these very Parameters."""
        made = layer_from_parameters(kind, weight, bias, **settings)
        if not cls.has_bias:
            del made._parameters["bias"]
        return made

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as (out_features, in_features)."""
        return self.matrix_of(tensor, self.__dict__)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out_features, in_features) in the weight's shape."""
        return self.weight_of(matrix, self.__dict__)

    def reset_parameters(self) -> None:
        """Initialise weight and bias afresh, as torch's class does; the mask stays."""
        super().reset_parameters()  # type: ignore[misc]
        if "mask" in self._buffers:
            self.zero_masked()

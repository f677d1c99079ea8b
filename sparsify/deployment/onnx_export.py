"""ONNX files of exported models, with the operators of the native library for ONNX Runtime."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsify.conversion.module_surgery import layers_of_type
from sparsify.kernels.cpu import library as native
from sparsify.kernels.torch_ops import FORM_IDS, in_own_onnx
from sparsify.layers import MaskedLayer, PackedLayer
from sparsify.outputs import new_file

#: The domain of the operators in csrc/onnxruntime.
DOMAIN = "sparsify"

#: Attributes of every operator, behind the interface's number.
_SETTINGS = ("form", "out_features", "in_features", "activation")

_FORMS = {number: form for form, number in FORM_IDS.items()}


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Any,
    *,
    dynamic_shapes: Any = None,
) -> None:
    """Write an exported model as ONNX for ONNX Runtime with the native library of this package.

    The sparse layers stay sparse: each is an operator of the domain "sparsify" over its packed weight, in the file and
    in memory. Without the library no runtime can load the file; with it, in Python:

        options.register_custom_ops_library(str(sparsify.native_paths().shared_library))

    A model for any runtime is `torch.onnx.export(sparsify.to_dense(copy.deepcopy(model)), ...)`: dense.

    model: the result of `export` on the CPU, in float32.
    example: inputs of the model: a tensor, a tuple, or a dict by name.
    dynamic_shapes: the sizes that may change, as torch.export takes them; without it all are those of the example.

    Raises ValueError for a layer without such an operator (of another dtype, on another device, masked), and for an
    installation without the native library. Needs the packages onnx and onnxscript.
    """
    _check(model)
    positional, named = ((), dict(example)) if isinstance(example, Mapping) else (_tuple(example), None)
    with warnings.catch_warnings(), in_own_onnx():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            model,
            positional,
            kwargs=named,
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=_translations(),
        )
    assert program is not None
    proto = program.model_proto
    if DOMAIN not in {opset.domain for opset in proto.opset_import}:
        proto.opset_import.add(domain=DOMAIN, version=1)
    with new_file(path, "cannot write ") as file:
        file.write(proto.SerializeToString())


def _tuple(example: Any) -> tuple[Any, ...]:
    return example if isinstance(example, tuple) else (example,)


def _check(model: nn.Module) -> None:
    """Raise ValueError for a model with a layer that has no operator."""
    if not native.available():
        raise ValueError(f"there is no native library: {native.why_missing()}; see `sparsify doctor`")
    for name, masked in layers_of_type(model, MaskedLayer).items():
        raise ValueError(
            f"{name or '(root)'}: a {type(masked).__name__} is not exported yet; call sparsify.export first"
        )
    for name, layer in layers_of_type(model, PackedLayer).items():
        where, has = layer.values.device.type, layer.float_dtype
        if layer.form not in native.INT8_FORMS or where != "cpu" or has != torch.float32:
            raise ValueError(
                f"{name or '(root)'}: ONNX Runtime gets operators for float32 in the forms of the CPU, "
                f"{', '.join(native.INT8_FORMS)}, and this layer is {layer.form!r} in {has} on {where}; "
                "export the model in float32 on the CPU"
            )


def _operator(name: str, weight: Sequence[str], numbers: Sequence[str]) -> Any:
    """Return an operator of csrc/onnxruntime, for the exporter to call: x, index, then these tensors of the weight."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    def given(about: str) -> Any:
        what, _, type_ = about.partition(":")
        kind = OpSchema.FormalParameterOption
        return OpSchema.FormalParameter(
            what.removesuffix("?"),
            f"tensor({type_ or 'float'})",
            param_option=kind.Optional if what.endswith("?") else kind.Single,
        )

    settings = [OpSchema.Attribute(number, OpSchema.AttrType.INT) for number in ("interface", *_SETTINGS)]
    settings += [OpSchema.Attribute(number, OpSchema.AttrType.INTS) for number in numbers]
    inputs = [given(about) for about in ("x", "index:uint8", *weight)]
    return Op(
        Opset(DOMAIN, 1), name, OpSchema(name, DOMAIN, 1, inputs=inputs, outputs=[given("y")], attributes=settings)
    )


def _translations() -> dict[Any, Callable[..., Any]]:
    """Return the ONNX operator for each operator of exported layers."""
    operators = {
        "linear": _operator("Linear", ("values", "bias?"), ()),
        "int8": _operator("LinearInt8", ("values:int8", "scale", "bias?"), ()),
        "pointwise": _operator("Pointwise", ("values", "bias?"), ()),
        "convolution": _operator("Convolution", ("values", "scale?", "bias?"), ("geometry",)),
    }

    def layer(form: str, *numbers: int) -> dict[str, int]:
        numbered = (native.FORM_NUMBERS[form], *numbers)
        return {"interface": native.INTERFACE, **dict(zip(_SETTINGS, numbered, strict=True))}

    def whole(first: int, end: int) -> None:
        if (first, end) != (0, -1):
            raise ValueError(
                "the model computes a part of the outputs of a layer by itself, and ONNX gets whole layers"
            )

    def linear(x, index, values, form, bias, out, inner, activation, first=0, end=-1):  # type: ignore[no-untyped-def]
        whole(first, end)
        return operators["linear"](x, index, values, bias, **layer(_FORMS[form], out, inner, activation))

    def int8(x, index, values, scale, form, bias, out, inner, activation, first=0, end=-1):  # type: ignore[no-untyped-def]
        whole(first, end)
        settings = layer(native.FORM_NAMES[form], out, inner, activation)
        return operators["int8"](x, index, values, scale, bias, **settings)

    def pointwise(x, index, values, bias, out, inner, activation):  # type: ignore[no-untyped-def]
        return operators["pointwise"](x, index, values, bias, **layer("panel", out, inner, activation))

    def convolution(x, index, values, scale, bias, out, inner, *settings):  # type: ignore[no-untyped-def]
        *geometry, activation = settings
        numbers = layer("panel", out, inner, activation)
        return operators["convolution"](x, index, values, scale, bias, geometry=geometry, **numbers)

    ops = torch.ops.sparsify
    return {
        ops.linear_packed.default: linear,
        ops.linear_int8.default: int8,
        ops.pointwise_packed.default: pointwise,
        ops.convolution_packed.default: convolution,
    }

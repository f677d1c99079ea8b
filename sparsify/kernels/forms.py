"""The forms of a packed weight in memory, and the devices they run on.

A form is a tuple of plain tensors. "csr" is the canonical one and runs everywhere, by the reference kernel; the others
are packed for the native CPU kernels (csrc/) or the Triton kernels for GPUs (gpu/), and are made from it and turned
back into it bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from sparsify.kernels import gpu
from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import CSR, check_csr, col_dtype
from sparsify.kernels.int8 import check_quantized, dequantize
from sparsify.kernels.trust import trust, trusted

#: The names of the tensors that make up each form. The last one holds the values, in the layer's dtype or int8.
FORMS: dict[str, tuple[str, ...]] = {
    "csr": CSR._fields,
    "panel": ("index", "values"),
    "bitmask": ("index", "values"),
    "gather": ("index", "values"),
    "sell": ("index", "values"),
    "quads": ("index", "values"),
    "quadmask": ("index", "values"),
    "quadsteps": ("index", "values"),
    "widesteps": ("index", "values"),
    "pairmask": ("index", "values"),
    "tiles": ("index", "values"),
    "narrow": ("index", "values"),
    "blocks": ("index", "values"),
    "2:4": ("index", "values"),
}

#: The tensor that a weight of int8 values has besides, behind the others: a scale for each output.
SCALE = "weight_scale"

#: The packed forms with kernels for int8 values. In "csr" they are widened for the reference kernel.
INT8_FORMS: tuple[str, ...] = native.INT8_FORMS

#: Of those, the forms that round their inputs to int8 too, each row by itself; the others leave inputs as they are.
_QUANTIZE_INPUTS: tuple[str, ...] = native.QUANTIZES_INPUTS

#: The forms that hold only masks of a pattern; see `fits`.
PATTERNED = ("blocks", "2:4")

#: The density below which "narrow" stands in on a GPU for a form of the CPU, and "tiles" above. Reasoned, not measured.
NARROW_BELOW = 0.2


def supports(form: str, device: torch.device, dtype: torch.dtype, *, quantized: bool = False) -> bool:
    """Return whether a kernel of this form runs on a device and dtype of inputs, in this process.

    quantized: with int8 values.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is none of: {', '.join(FORMS)}")
    if form == "csr" or device.type == "meta":
        return True
    return not _why_not(form, device, dtype, quantized)


def quantizes_inputs(form: str) -> bool:
    """Return whether a form of int8 values rounds its inputs to int8, too."""
    return form in _QUANTIZE_INPUTS


def part_names(form: str, *, quantized: bool) -> tuple[str, ...]:
    """Return the names of the tensors of a weight in a form."""
    return (*FORMS[form], SCALE) if quantized else FORMS[form]


def fits(form: str, csr: CSR, shape: tuple[int, int]) -> bool:
    """Return whether a form can hold this weight: some are for masks of a pattern, some for not too many inputs."""
    if quantizes_inputs(form):
        return shape[1] <= native.MOST_QUANTIZED_IN
    return form not in gpu.FORMS or gpu.fits(form, csr, shape)


def form_for(wanted: str, csr: CSR, shape: tuple[int, int], dtype: torch.dtype | None = None) -> str:
    """Return the wanted form if it runs and fits, else one with kernels there, else "csr".

    dtype: of the inputs of int8 values. The stand-in is not measured; `export` measures.
    """
    density = csr.values.numel() / max(shape[0] * shape[1], 1)
    candidates = (wanted, "panel", "narrow" if density < NARROW_BELOW else "tiles")
    device, quantized, dtype = csr.values.device, _is_int8(csr), _dtype(csr, dtype)
    runs = (form for form in candidates if supports(form, device, dtype, quantized=quantized))
    return next((form for form in runs if fits(form, csr, shape)), "csr")


def pack(
    form: str, csr: CSR, shape: tuple[int, int], scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Pack a CSR weight of shape (out, in) into a form, on the device of the form's kernels.

    scale, dtype: of int8 values, the scales, which become the last part, and the dtype of inputs. Raises ValueError if
    it is no valid CSR weight, or if the form cannot run on its device and dtype.
    """
    check_csr(csr, shape)
    if scale is not None or _is_int8(csr):
        check_quantized(csr.values, csr.values.new_empty(0) if scale is None else scale, shape[0])
    device, quantized, dtype = csr.values.device, _is_int8(csr), _dtype(csr, dtype)
    if not supports(form, device, dtype, quantized=quantized):
        why = _why_not(form, device, dtype, quantized)
        raise ValueError(f"form {form!r} does not run here: {why}; use 'csr', and see 'sparsify doctor'")
    parts = tuple(csr) if form == "csr" else _pack(form, csr, shape)
    return parts if scale is None else (*parts, scale)


def _pack(form: str, csr: CSR, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if form in gpu.FORMS:
        index, values = gpu.pack(form, csr, shape)
    else:
        index, values = native.pack(form, csr.crow, csr.col, csr.values, shape)
    trust(index, form, values.numel(), shape)
    return index, values


def usable_index(form: str, index: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the index of a packed form for a kernel to follow. Raises ValueError if it is none of this weight."""
    return trusted(index, _check_index, form, values.numel(), shape)


def usable_csr(csr: CSR, shape: tuple[int, int]) -> CSR:
    """Return a CSR weight for code to follow. Raises ValueError if it is none of this shape."""
    crow, col, values = csr
    if values.is_meta or torch.compiler.is_compiling():  # a graph is made of shapes, not of contents
        return csr

    def check(index: Tensor, other: int, n_values: int, shape: tuple[int, int]) -> None:
        check_csr(CSR(index, col, values) if other == id(col) else CSR(crow, index, values), shape)

    for index, other in ((crow, col), (col, crow)):
        trusted(index, check, id(other), values.numel(), shape)
    return csr


def unpack_as(dtype: torch.dtype, form: str, parts: tuple[Tensor, ...], shape: tuple[int, int]) -> CSR:
    """Turn a form back into CSR as `unpack` does, with int8 values as what they stand for, in a dtype."""
    csr = unpack(form, parts, shape)
    return dequantize(csr, parts[-1], dtype) if is_quantized(form, parts) else csr


def is_quantized(form: str, parts: tuple[Tensor, ...]) -> bool:
    """Return whether the parts of a weight are those of int8 values."""
    return len(parts) > len(FORMS[form])


def unpack_in_transform(dtype: torch.dtype, form: str, parts: tuple[Tensor, ...], shape: tuple[int, int]) -> CSR:
    """Call `unpack_as` inside torch.func's transforms, which otherwise wrap every tensor that is made."""
    with temporarily_clear_interpreter_stack():
        return unpack_as(dtype, form, parts, shape)


def unpack(form: str, parts: tuple[Tensor, ...], shape: tuple[int, int]) -> CSR:
    """Turn a form back into CSR, on the device of its parts. Raises ValueError for parts of another form.

    int8 values stay what they are, without their scales; see `unpack_as`.
    """
    if form == "csr":
        return usable_csr(CSR(*parts[:3]), shape)
    index, packed = parts[:2]
    if packed.is_meta:
        raise ValueError(
            f"the weight of an exported layer, in the form {form!r}, is on the meta device and has no data; "
            "load it (load_state_dict, sparsify.load) before it is read"
        )
    index = usable_index(form, index, packed, shape)
    if form in gpu.FORMS:
        return gpu.unpack(form, index, packed, shape)
    crow, col, values = native.unpack(form, index, packed, shape)
    device = packed.device
    return CSR(crow.to(device), col.to(col_dtype(shape[1])).to(device), values.to(device))


def _check_index(index: Tensor, form: str, n_values: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless kernels can follow an index."""
    if form in gpu.FORMS:
        gpu.check(form, index, n_values, shape)
    else:
        native.check(form, index, n_values, shape)


def _is_int8(csr: CSR) -> bool:
    return csr.values.dtype == torch.int8


def _dtype(csr: CSR, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the inputs of a weight: that of its values, or another of int8 values."""
    if _is_int8(csr):
        return torch.float32 if dtype is None else dtype
    return csr.values.dtype


def _why_not(form: str, device: torch.device, dtype: torch.dtype, quantized: bool = False) -> str:
    """Return the reason if no kernel of a packed form runs on a device and dtype, else ""."""
    if quantized and form not in INT8_FORMS:
        return f"it has no kernels for int8 values; those have: {', '.join(INT8_FORMS) or 'none'}"
    if quantizes_inputs(form) and not quantized:
        return "it holds int8 values alone"
    if form in gpu.FORMS:
        missing = gpu.why_not(form, device, dtype)
        return missing and f"it needs the kernels for GPUs: {missing}"
    missing = native.why_missing()
    if device.type != "cpu":
        missing = f"they run on the CPU, not on {device.type}"
    elif not missing and form == native.PAIRMASK and (dtype != torch.bfloat16 or not native.kernel().endswith("amx")):
        missing = "it is for bfloat16 on processors with AMX"
    elif not missing and dtype not in native.DTYPES:
        missing = f"{dtype} is not among their types"
    return missing and f"it needs the native CPU kernels: {missing}"

"""The native CPU kernels behind tensors: pack a CSR weight into a form, unpack it, multiply with it.

The library sparsify/_native.so (sources in sparsify/csrc, interface in csrc/sparsify.h) is loaded at import with
ctypes, after torch, so that both share one OpenMP runtime; calls release the GIL. A packed weight is two plain
tensors: `index` (uint8) and `values` (of DTYPES, or int8 beside a scale for each row).
"""

import ctypes
import math
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.cpu.memory import LEAST_BYTES, empty

#: The forms of float values.
FORMS = ("panel", "bitmask", "gather", "sell")
#: The forms that quantise each row of the input; their values are int8 and end with the sums of the rows.
QUANTIZES_INPUTS = ("quads", "quadmask", "quadsteps", "widesteps")
#: The forms of int8 values.
INT8_FORMS = (*FORMS, *QUANTIZES_INPUTS)
#: The form of bfloat16 values and inputs alone; it is made for AMX, and slow on any other instruction set.
PAIRMASK = "pairmask"
#: All of them in the order of `enum sparsify_form`.
FORM_NAMES = ("panel", "bitmask", "gather", "quads", "quadmask", "quadsteps", PAIRMASK, "sell", "widesteps")
FORM_NUMBERS = {form: number for number, form in enumerate(FORM_NAMES)}
MOST_QUANTIZED_IN = 65536  # SPARSIFY_MOST_QUANTIZED_IN
INTERFACE = 10  # SPARSIFY_INTERFACE
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "hardswish": 5, "relu6": 6}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_PACKAGE = Path(__file__).resolve().parents[2]
_LIBRARY = Path(os.environ.get("SPARSIFY_NATIVE_LIBRARY", _PACKAGE / "_native.so"))
_ERRORS = {
    -1: "crow and col are no CSR matrix of this shape: pointers must rise from 0, columns must rise within a row",
    -2: "the packed index is damaged or belongs to another form or shape",
    -3: "argument out of range",
    -4: "out of memory",
    -5: "unknown kernel",
    -6: "this processor lacks the instructions of the kernel",
    -7: "SPARSIFY_THREADS names no team of threads of the native kernels: openmp (Linux), pool or serial",
}

_pointer, _int64, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "index_bytes": (_int64, [_int64, _int64, _pointer, _pointer]),
    "n_values": (_int64, [_int64, _int64, _pointer, _pointer]),
    "pack": (_int, [_int64, _int64, _pointer, _pointer, _pointer, _pointer]),
    "check": (_int, [_int64, _int64, _pointer, _int64, _int64]),
    "nnz": (_int64, [_pointer]),
    "unpack": (_int, [_int64, _int64, _pointer, _int64, _int64, _pointer, _pointer, _pointer]),
}
_MANY_VALUES = LEAST_BYTES // 4  # of an output
_LINEAR_CALL = struct.Struct("=14q")  # struct sparsify_linear_call
_INT8_CALL = struct.Struct("=15q")  # struct sparsify_int8_call
_POINTWISE_CALL = struct.Struct("=17q")  # struct sparsify_pointwise_call


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and why it is missing ("" when it is not)."""
    if not _LIBRARY.exists():
        reason = _PACKAGE / "_native.missing.txt"
        return None, reason.read_text().strip() if reason.exists() else f"{_LIBRARY} was not built"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return None, str(error)
    if not hasattr(library, "sparsify_interface") or library.sparsify_interface() != INTERFACE:
        return None, f"{_LIBRARY} was built from other sources; build it again: python setup.py build_native"
    library.sparsify_kernel.restype = library.sparsify_known_kernels.restype = ctypes.c_char_p
    library.sparsify_threads.restype = ctypes.c_char_p
    library.sparsify_set_kernel.argtypes = [ctypes.c_char_p]
    library.sparsify_kernel_origin.restype = ctypes.c_char_p
    library.sparsify_kernel_origin.argtypes = [ctypes.c_char_p, _int, _int]
    return library, ""


_library, _why_missing = _load()
if _library is None:
    warnings.warn(
        "sparsify has no native kernels: exported layers run on the slow reference in plain torch, and "
        "export(format='auto') keeps layers dense. `sparsify doctor` says why, and what to do",
        stacklevel=2,
    )


def _loaded() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError(f"no native kernels: {_why_missing}")
    return _library


def function(name: str, signature: tuple[Any, Any]) -> Any:
    """Return an exported function by name, with the types of its result and arguments."""
    function = getattr(_loaded(), name)
    function.restype, function.argtypes = signature
    return function


# Looked up once: a call must cost microseconds.
_form_functions: dict[str, dict[str, Any]] = {}
_linear: Any = None
_linear_int8: Any = None
_pointwise: Any = None
_forget_stalls: Any = None
_pack_call, _pack_int8_call, _pack_pointwise_call = _LINEAR_CALL.pack, _INT8_CALL.pack, _POINTWISE_CALL.pack
if _library is not None:
    for _form in FORM_NAMES:
        _form_functions[_form] = {n: function(f"sparsify_{_form}_{n}", s) for n, s in _SIGNATURES.items()}
    _linear = function("sparsify_linear", (_int, [_int, _int, ctypes.c_char_p]))
    _linear_int8 = function("sparsify_linear_int8", (_int, [_int, _int, ctypes.c_char_p]))
    _pointwise = function("sparsify_pointwise", (_int, [_int, ctypes.c_char_p]))
    _forget_stalls = function("sparsify_forget_stalls", (None, []))


def available() -> bool:
    """Return whether the native library is there and can be used."""
    return _library is not None


def path() -> Path:
    """Return the file of the native library."""
    return _LIBRARY


def why_missing() -> str:
    """Why the native library is not there; empty if it is."""
    return _why_missing


def known_kernels() -> list[str]:
    """Instruction sets the library was built for, best first."""
    return _library.sparsify_known_kernels().decode().split() if _library is not None else []


def kernel() -> str:
    """Return the name of the instruction set in use. Raises ValueError if SPARSIFY_KERNEL names an unusable one."""
    library = _loaded()
    status = library.sparsify_kernel_status()
    if status:
        _raise_kernel(os.environ.get("SPARSIFY_KERNEL", ""), status, "SPARSIFY_KERNEL=")
    return str(library.sparsify_kernel().decode())


def set_kernel(name: str) -> None:
    """Use the kernels of another instruction set from now on, "" for the best. Not while another thread computes."""
    status = _loaded().sparsify_set_kernel(name.encode())
    if status:
        _raise_kernel(name, status)


def team() -> str:
    """Return who runs the kernels' tasks: "openmp" (the threads of torch on Linux), "pool" (own ones) or "serial".

    Raises ValueError if SPARSIFY_THREADS names another.
    """
    name = str(_loaded().sparsify_threads().decode())
    if not name:
        raise ValueError(f"SPARSIFY_THREADS={os.environ.get('SPARSIFY_THREADS')}: {_ERRORS[-7]}")
    return name


def kernel_origin(name: str, form: str, *, quantized: bool) -> str:
    """Return the instruction set whose code the kernels of another one run for a form, with int8 values if quantized.

    "avx512vnni" runs "panel" by the code of "avx512", and "quads" by its own.
    """
    origin: bytes | None = _loaded().sparsify_kernel_origin(name.encode(), FORM_NUMBERS[form], quantized)
    if origin is None:
        raise ValueError(f"{name}: unknown kernel; known: {', '.join(known_kernels())}")
    return origin.decode()


def forget_stalls() -> None:
    """Let the next call use all threads, though the last ones waited for a busy core."""
    if _library is not None:
        _forget_stalls()


def pack(form: str, crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pack a CSR weight of `shape` (out, in) into `form`: (index, values in packed order, padding 0).

    crow (out + 1) and col (nnz) are made int32; columns must rise strictly within a row.
    Raises ValueError for any other matrix, or if values have a dtype that the form does not take.
    """
    if form in QUANTIZES_INPUTS and (values.dtype != torch.int8 or shape[1] > MOST_QUANTIZED_IN):
        raise ValueError(
            f"the form {form!r} takes int8 values of at most {MOST_QUANTIZED_IN} inputs, "
            f"got {values.dtype} and {shape[1]} inputs"
        )
    if form == PAIRMASK and values.dtype != torch.bfloat16:
        raise ValueError(f"the form {form!r} takes bfloat16 values, got {values.dtype}")
    functions, (out, in_) = _form_functions[form], shape
    cpu = torch.device("cpu")  # said wherever a tensor is made: the default device may be another
    crow = crow.to(device=cpu, dtype=torch.int32).contiguous()
    col = col.to(device=cpu, dtype=torch.int32).contiguous()
    if crow.numel() != out + 1 or int(crow[-1]) != col.numel() or col.numel() != values.numel():
        raise ValueError(
            f"{tuple(crow.shape)} row pointers, the last {int(crow[-1]) if crow.numel() else None}, {col.numel()} "
            f"columns and {values.numel()} values are no CSR matrix of shape {tuple(shape)}"
        )
    csr = (out, in_, crow.data_ptr(), col.data_ptr())
    n_values = checked(functions["n_values"](*csr))
    index = torch.zeros(checked(functions["index_bytes"](*csr)), dtype=torch.uint8, device=cpu)
    order = torch.empty(n_values, dtype=torch.int64, device=cpu)
    checked(functions["pack"](*csr, index.data_ptr(), order.data_ptr()))
    padding = order < 0
    packed = values.detach().cpu()[order.clamp_(min=0)] if values.numel() else values.new_zeros(n_values)
    packed.masked_fill_(padding, 0)
    if form in QUANTIZES_INPUTS and out:
        sums = torch.nn.functional.pad(values.detach().cpu().cumsum(0, dtype=torch.int64), (1, 0))[crow.long()].diff()
        packed[-4 * out :] = sums.int().view(torch.int8)
    return index, packed


def check(form: str, index: Tensor, n_values: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless kernels can safely read this index, perhaps of a stranger's file."""
    if index.dtype != torch.uint8 or not index.is_cpu or not index.is_contiguous():
        raise ValueError(_ERRORS[-2])
    status = _form_functions[form]["check"](*shape, index.data_ptr(), index.numel(), n_values)
    checked(status)


def unpack(form: str, index: Tensor, values: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of pack: (crow int32, col int32, values), bit for bit. The index must have passed check."""
    functions, (out, in_) = _form_functions[form], shape
    cpu = torch.device("cpu")
    index, values = index.cpu(), values.detach().cpu()
    nnz = functions["nnz"](index.data_ptr())
    crow = torch.empty(out + 1, dtype=torch.int32, device=cpu)
    col = torch.empty(nnz, dtype=torch.int32, device=cpu)
    order = torch.empty(values.numel(), dtype=torch.int64, device=cpu)
    checked(
        functions["unpack"](
            out, in_, index.data_ptr(), index.numel(), values.numel(), crow.data_ptr(), col.data_ptr(), order.data_ptr()
        )
    )
    kept = order >= 0
    unpacked = values.new_empty(nnz)
    unpacked[order[kept]] = values[kept]
    return crow, col, unpacked


def linear(
    form: str,
    x: Tensor,
    index: Tensor,
    values: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    activation: int = 0,
    out: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) for x of shape (..., in): a tensor of shape (..., out).

    activation is a value of ACTIVATIONS. x, values and bias share a dtype of DTYPES; values with a scale are int8. Of
    the outputs only those from rows[0] to before rows[1] if given. Trusts index and values (see check), and does no
    more in Python than it must.
    """
    n_out, n_in = shape
    first, end = rows or (0, n_out)
    *leading, _ = x.shape
    # Rows that lie one after another need no tensor of two dimensions: a view takes a microsecond.
    flat, stride = (x, n_in) if x.is_contiguous() else _rows_of(x, n_in)
    n_tokens = math.prod(leading)
    if out is not None:
        y = out
    elif n_tokens * (end - first) >= _MANY_VALUES:
        y = empty((*leading, end - first), x.dtype)
    else:  # sizes one by one: as a tuple they take half a microsecond more
        y = x.new_empty(*leading, end - first)
    call = (
        index.data_ptr(),
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        flat.data_ptr(),
        stride,
        y.data_ptr(),
        end - first if out is None else out.stride(0),
        n_tokens,
        n_out,
        n_in,
        activation,
        torch.get_num_threads(),
        first,
        end,
    )
    if scale is None:
        status = _linear(FORM_NUMBERS[form], DTYPES[x.dtype], _pack_call(*call))
    else:
        status = _linear_int8(FORM_NUMBERS[form], DTYPES[x.dtype], _pack_int8_call(*call, scale.data_ptr()))
    if status:
        checked(status)
    return y


def linear_int8(
    form: str,
    x: Tensor,
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    activation: int = 0,
    out: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Do as `linear` with int8 values, each times its row's scale, float32 (out); form is one of INT8_FORMS.

    x and bias share a dtype of DTYPES. A form of QUANTIZES_INPUTS quantises each row of x (csrc/sparsify.h).
    """
    return linear(form, x, index, values, bias, shape, activation, out, rows, scale)


def _rows_of(x: Tensor, n_in: int) -> tuple[Tensor, int]:
    """Return x (..., in) as rows (tokens, in) whose elements are neighbours, and the distance of two rows."""
    flat = x if x.dim() == 2 else x.reshape(-1, n_in)
    flat = flat if n_in <= 1 or flat.stride(1) == 1 else flat.contiguous()
    return flat, flat.stride(0)


def pointwise(
    x: Tensor,
    index: Tensor,
    values: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    activation: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Apply `linear` at each position of images x (n, in, height, width): (n, out, height, width), channels first.

    The form is "panel". Each channel of an image is read, and written to `out`, where it lies: in one piece.
    """
    n_out, n_in = shape
    n, _, height, width = x.shape
    if not x.is_contiguous() and (x.stride(3), x.stride(2)) != (1, width):
        x = x.contiguous()
    y = empty((n, n_out, height, width), x.dtype) if out is None else out
    status = _pointwise(
        DTYPES[values.dtype],
        _pack_pointwise_call(
            index.data_ptr(),
            values.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            x.data_ptr(),
            x.stride(1),
            y.data_ptr(),
            y.stride(1),
            height * width,
            n_out,
            n_in,
            activation,
            torch.get_num_threads(),
            0,
            n_out,
            n,
            x.stride(0),
            y.stride(0),
        ),
    )
    if status:
        checked(status)
    return y


def checked(status: int) -> int:
    """Return what a native function returned. Raises ValueError if it is a failure."""
    if status in (-5, -6):
        kernel()  # raises
    if status < 0:
        raise ValueError(_ERRORS.get(status, f"native error {status}"))
    return status


def _raise_kernel(name: str, status: int, prefix: str = "") -> None:
    raise ValueError(f"{prefix}{name}: {_ERRORS[status]}; known: {', '.join(known_kernels())}")

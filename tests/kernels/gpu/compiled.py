"""A launch compiled for a GPU that need not be there: its PTX, and what the assembler says of it."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from launches import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_POINTERS = {
    torch.uint8: "*u8", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_DIVISIBLE = [["tt.divisibility", 16]]


class Compiled(NamedTuple):
    """The PTX, a program's shared memory, a thread's registers, and its bytes on the stack: spilled registers."""

    ptx: str
    shared_bytes: int
    n_registers: int
    stack_bytes: int


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile as the launch would on a device of this compute capability (90 for 9.0)."""
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.arguments, strict=False))
    given |= {name: value for name, value in launch.options.items() if name in names}
    signature, constants, attributes = {}, {}, {}
    for number, name in enumerate(names):
        value = given[name]
        if name == "IS_WIDENED":
            value = False  # the interpreter's alone
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(number,)] = _POINTERS[value.dtype], _DIVISIBLE
        elif name.isupper() or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name != "tokens":
                attributes[(number,)] = _DIVISIBLE
    options = {name: value for name, value in launch.options.items() if name in _OPTIONS}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Compiled(compiled.asm["ptx"], compiled.metadata.shared, *_resources(compiled.asm["cubin"]))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and its bytes on the stack: what did not fit into them."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [cuobjdump, "-res-usage", file]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2])

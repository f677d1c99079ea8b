"""Instructions of the inner loops of a compiled kernel, counted from its disassembly: for processors that are not here.

    aarch64-linux-gnu-g++ -std=c++17 -O3 -Isparsify/csrc -c sparsify/csrc/isa/neon.cpp -o build/neon.o
    python scripts/instructions.py build/neon.o --function 'gather_tile<1' --objdump aarch64-linux-gnu-objdump

A line for each innermost loop with multiply-adds: its length, its multiply-adds, its loads by width, and all else.
Divided by the non-zeros that one pass of the loop multiplies, which the kernel's source says, that is the cost of one.
"""

import argparse
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

MULTIPLY_ADDS = ("fmla", "sdot", "usdot", "sadalp", "vfmadd", "vpdpbusd")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(?:[0-9a-f]{2,8} )+\s*\t(\S+)\s*(.*)$")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
BRANCH = re.compile(r"^(?:b|b\..*|cbn?z|tbn?z|j[a-z]+)$")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a disassembly."""

    address: int
    name: str
    operands: str

    def target(self) -> int | None:
        """Return the address that a branch goes to."""
        found = re.search(r"([0-9a-f]+) <", self.operands) if BRANCH.match(self.name) else None
        return int(found[1], 16) if found else None

    def kind(self) -> str:
        """Return the column of the table that counts it."""
        if self.name.startswith(MULTIPLY_ADDS):
            return "multiply-adds"
        if self.name.startswith("ld"):
            wide = re.match(r"[qv]\d|\{", self.operands)
            return ("vector pairs" if self.name == "ldp" else "vector loads") if wide else "other loads"
        return "others"


def functions(disassembly: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Split a disassembly, names demangled, into functions."""
    name, body = "", list[Instruction]()
    for line in disassembly.splitlines():
        if header := FUNCTION.match(line):
            if body:
                yield name, body
            name, body = re.sub(r"\(anonymous namespace\)::|sparsify::|^(void|int) ", "", header[1]), []
            name = name.split("(")[0]
        elif found := INSTRUCTION.match(line):
            body.append(Instruction(int(found[1], 16), found[2], found[3]))
    if body:
        yield name, body


def inner_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """Return the loops of a function that hold no other: what lies between a branch back and its target.

    >>> code = [Instruction(a, n, o) for a, n, o in ((0, "fmla", ""), (4, "fmla", ""), (8, "b.ne", "4 <f+4>"))]
    >>> [len(loop) for loop in inner_loops(code)]
    [2]
    """
    back = [(t, i.address) for i in body if (t := i.target()) is not None and t <= i.address]
    innermost = [
        (start, end)
        for start, end in back
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in back)
    ]
    return [[i for i in body if start <= i.address <= end] for start, end in innermost]


def main() -> None:
    """Print the loops of the functions asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("object", help="file of the compiler")
    parser.add_argument("--function", default="", help="part of a function's name, as c++filt prints it")
    parser.add_argument("--objdump", default="objdump", help="the disassembler")
    arguments = parser.parse_args()
    command = [arguments.objdump, "-d", "-C", arguments.object]
    disassembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    columns = ("multiply-adds", "vector pairs", "vector loads", "other loads", "others")
    print("all", *columns, "function", sep="\t")
    for name, body in functions(disassembly):
        if arguments.function not in name:
            continue
        for loop in inner_loops(body):
            counts = Counter(i.kind() for i in loop)
            if counts["multiply-adds"]:
                print(len(loop), *(counts[c] for c in columns), name, sep="\t")


if __name__ == "__main__":
    main()

"""The instruction sets that a run of the suite has tested, its last lines about them, and the faults they show."""

from collections import Counter
from dataclasses import dataclass, field

import pytest

from sparsify.kernels.cpu import library as native

#: For tests that ask for a native form by name, or measure which form wins.
needs_native = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.why_missing()}")


@dataclass
class TestedKernels:
    """Counts of kernel tests by instruction set, and the reasons of those that this processor cannot run."""

    __test__ = False  # not a class of tests, in spite of its name

    known: list[str]
    why_missing: str = ""
    in_use: str = ""
    ran: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def nothing_yet(cls) -> "TestedKernels":
        """Begin a run. Raises ValueError if SPARSIFY_KERNEL names what cannot be used here."""
        in_use = native.kernel() if native.available() else ""
        return cls(native.known_kernels(), native.why_missing(), in_use)

    def lines(self) -> list[str]:
        """Return the last lines of the run: what was tested, what was not and why."""
        if self.why_missing:
            return [f"NO NATIVE KERNEL WAS TESTED: {self.why_missing}"]
        if not (self.ran or self.skipped):
            return [f"native kernels tested: none, no test of one was selected; all tests ran on {self.in_use}"]
        counts = ", ".join(f"{kernel} ({self.ran[kernel]} tests)" for kernel in self.known if self.ran[kernel])
        missed = [why for kernel, why in self.skipped.items() if not self.ran[kernel]]  # the reasons name the kernels
        lines = [f"native kernels tested: {counts or 'none'}; all other tests ran on {self.in_use}"]
        return lines + ([f"native kernels not tested: {'; '.join(missed)}"] if missed else [])

    def fault(self, *, whole_suite: bool) -> str:
        """Return the reason why the run must fail, or "".

        Only a machine without a compiler may leave all kernels untested, or a run of a part of the suite.
        """
        if self.why_missing:
            no_compiler = self.why_missing.startswith("no C++ compiler")
            return "" if no_compiler else "the native library is not there, though a compiler may be"
        if (whole_suite or self.skipped) and not self.ran:
            return "a run of kernel tests tested no native kernel"
        return ""

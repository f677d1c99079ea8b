"""The code that multiplies. One operator per format, declared once, with the reference as its default on every device.

A faster kernel is an implementation of the same operator for one device: `ops.py` is the one place where it is hooked
in.
"""

from sparsify.kernels.ops import linear_csr

__all__ = ["linear_csr"]

"""Kernels for GPUs in Triton's language."""

"""Kernels for CPUs: the native library behind tensors."""

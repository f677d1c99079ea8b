"""Kernels: code that multiplies with one form of sparse weight."""

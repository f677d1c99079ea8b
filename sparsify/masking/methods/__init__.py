"""Pruning methods: scores of weights, and solvers that also change the kept weights."""

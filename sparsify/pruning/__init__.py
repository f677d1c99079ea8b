"""Prune a model now, with or without calibration data."""

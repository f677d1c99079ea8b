"""Masks from scores, and repaired weights: tensors only, no modules."""

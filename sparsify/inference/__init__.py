"""A masked model to a fast model."""

"""A model to a file, and back."""

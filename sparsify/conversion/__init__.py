"""A dense model to a masked model, and back."""

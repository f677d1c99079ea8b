"""Contents and speed of a model or a file."""

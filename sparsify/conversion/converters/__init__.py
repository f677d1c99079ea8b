"""One converter for each type of module."""

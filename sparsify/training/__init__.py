"""Follow a recipe in a training loop."""

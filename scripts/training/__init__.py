"""The training experiments behind docs/training.md."""

"""The training experiments behind docs/results/training.md."""

"""The parts of scripts/oneshot.py: pretrained models, ways to prune them without training, and the page of results."""

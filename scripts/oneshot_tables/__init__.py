"""What scripts/oneshot.py measures: pretrained models, ways to prune them without training, and the page of results."""

"""The benchmarks of scripts/bench.py, a file each, their peers, and the page written from their results."""

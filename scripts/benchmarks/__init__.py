"""What scripts/bench.py runs: one file per benchmark, the peers, and the page written from their results."""

"""The parts of scripts/tradeoff.py: the candidates, their quality on two kinds of text, and the page."""

"""Pretrained models that ship inside packages: building them, their data, and measures of their quality."""

"""Pretrained models shipped inside packages: building them, their data, and measures of their quality."""

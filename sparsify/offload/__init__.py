"""Models larger than memory, and interrupted runs."""

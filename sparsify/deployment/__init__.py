"""Models for programs without Python, and for other runtimes."""

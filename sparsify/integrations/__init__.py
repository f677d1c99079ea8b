"""Recipes in other people's trainers. Each file needs the library of its name, and is imported by that name."""

"""Recipes in other people's trainers. Each file needs the library it is named after, and is imported by its name."""

"""A YAML file to a checked recipe, and a recipe to masks."""

"""sparsify recipes: the recipes that come with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsify.cli.printing import print_json, show
from sparsify.errors import RecipeError
from sparsify.recipes.given import given_recipes, recipe_file
from sparsify.recipes.loading import load_recipe
from sparsify.recipes.schema import Recipe
from sparsify.tables import Listing, Table


def recipes(arguments: argparse.Namespace) -> None:
    """List the given recipes, or print one of them to copy."""
    given = given_recipes()
    if arguments.name is not None:
        if arguments.json:
            raise ValueError("--json is for the list; a recipe is printed as it is")
        if arguments.name not in given:
            recipe_file(arguments.name)  # raises with the nearest name
            raise RecipeError(f"{arguments.name} is a file, and none of our recipes; `sparsify recipes` lists them")
        print(Path(given[arguments.name]).read_text(encoding="utf-8"), end="")
        return
    loaded = {name: load_recipe(file) for name, file in given.items()}
    if arguments.json:
        print_json({name: {"needs": _needs(r), "description": r.description} for name, r in loaded.items()})
        return
    lines = [(name, _needs(recipe), recipe.description) for name, recipe in loaded.items()]
    show(Listing((), [("", Table(("recipe", "needs", "description"), lines, left=("needs", "description")))]))
    print("\nuse:  sparsify compress --recipe NAME ...        change variables: --set sparsity=0.8")
    print("copy: sparsify recipes NAME > mine.yaml          in Python: sparsify.load_recipe(NAME, sparsity=0.8)")


def _needs(recipe: Recipe) -> str:
    if any(group.trains for group in recipe.groups):
        return "training"
    return (
        "data"
        if recipe.recover or recipe.reconstruct or any(group.needs_data for group in recipe.groups)
        else "nothing"
    )

"""The recipes that come with the package, by name."""

from __future__ import annotations

import os
from pathlib import Path

from sparsify.errors import RecipeError
from sparsify.recipes.yaml_file import nearest

#: The folder in an installed package, and the one of a clone.
_PLACES = (Path(__file__).with_name("given"), Path(__file__).resolve().parents[2] / "recipes")


def given_recipes() -> dict[str, Path]:
    """Return the files of the recipes that come with the package, by name."""
    folder = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def recipe_file(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the file meant by a path or the name of a given recipe; a file that is there comes first.

    Raises RecipeError for a bare name that is neither.
    """
    text = os.fspath(path)
    if os.path.lexists(text) or os.path.basename(text) != text or os.path.splitext(text)[1] in (".yaml", ".yml"):
        return path
    given = given_recipes()
    if text not in given:
        raise RecipeError(
            f"there is no file and no recipe {text!r}{nearest(text, given)}; `sparsify recipes` lists ours"
        )
    return given[text]

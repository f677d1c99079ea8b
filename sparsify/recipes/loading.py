"""Recipe files: read, with variables put in, and checked.

A fault becomes one RecipeError, naming the file, the line, the key and the nearest valid word.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import yaml
from pydantic import ValidationError

from sparsify.errors import RecipeError
from sparsify.masking.schedules import Schedule
from sparsify.recipes.given import recipe_file
from sparsify.recipes.schema import Group, Recipe, Reconstruct, Recover, Regrow
from sparsify.recipes.yaml_file import Value, YamlFile, nearest, nested_values, read_yaml, substitute


def load_recipe(path: str | os.PathLike[str], **variables: Value) -> Recipe:
    """Read and check a recipe file, or one of ours by its name; keyword arguments override its variables.

    path: a file, or a name in the list of `sparsify recipes`, without ".yaml". A file of that name comes first.
    Raises RecipeError, naming file, line and key, and OSError if the file cannot be opened.
    """
    file = read_yaml(recipe_file(path))
    if not isinstance(file.content, dict):
        raise file.error((), f"a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    declared = file.content.get("vars") or {}
    if not isinstance(declared, dict):
        raise file.error(("vars",), "vars is a mapping from name to value")
    for name in variables:
        if name not in declared:
            raise file.error(
                ("vars",) if "vars" in file.content else (),
                f"there is no variable {name!r} to set{nearest(name, declared)}",
            )
    values: dict[str, Value] = {**declared, **variables}
    body: dict[str, Value] = {key: value for key, value in file.content.items() if key != "vars"}
    used = {value for value in nested_values(body) if isinstance(value, str)}
    for name in declared:
        if f"${{{name}}}" not in used:
            raise file.error(
                ("vars", name), f"the variable {name!r} is used nowhere; write ${{{name}}} where it belongs"
            )
    content = substitute(file, body, values)
    assert isinstance(content, dict)
    try:
        return Recipe.model_validate({**content, "vars": values})
    except ValidationError as error:
        raise _explain(file, error) from None


def _explain(file: YamlFile, error: ValidationError) -> RecipeError:
    """Turn the first fault in pydantic's report into a sentence with file, line and key."""
    first = error.errors(include_url=False)[0]
    place = tuple(
        key
        for key in first["loc"]
        if key in ("groups", "schedule", "regrow", "reconstruct", "recover")
        or isinstance(key, int)
        or _is_key(file, key)
    )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        place = first["loc"]
        message = f"unknown key {place[-1]!r}{nearest(str(place[-1]), _known_keys(place[:-1]))}"
    elif first["type"] == "missing":
        message = f"the key {first['loc'][-1]!r} is missing"
    elif first["type"] == "literal_error" and isinstance(first["input"], str):
        expected = [word.strip("' ") for word in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        message = f"{first['input']!r} is not valid here{nearest(first['input'], expected)}"
    return file.error(place, message)


def _is_key(file: YamlFile, key: str | int) -> bool:
    return any(key in place for place in file.lines)


def _known_keys(place: tuple[str | int, ...]) -> list[str]:
    if place and place[-1] == "schedule":
        return [field.name for field in fields(Schedule)]
    if place and place[-1] == "regrow":
        return list(Regrow.model_fields)
    if place and place[-1] == "reconstruct":
        return list(Reconstruct.model_fields)
    if place and place[-1] == "recover":
        return list(Recover.model_fields)
    return list(Group.model_fields if place else Recipe.model_fields)


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML, without the keys at their defaults."""
    content: dict[str, Any] = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"vars"})
    return yaml.safe_dump({"version": 1, **content}, sort_keys=False, width=100)

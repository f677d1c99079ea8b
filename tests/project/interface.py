"""The public interface as plain data: signatures, the command line's options, the keys of a recipe.

    python tests/project/interface.py > tests/data/interface.json

tests/data/interface.json is what the interface was before the package had sub-packages; test_interface.py holds it.
"""

import contextlib
import inspect
import io
import json
import re
from typing import Any

import sparsify
from sparsify import cli


def interface() -> dict[str, Any]:
    """Return signatures by name, options by command and recipe keys by model."""
    return {
        "signatures": {key: found for name in sparsify.__all__ for key, found in _signatures(name).items()},
        "options": {command: _options([command]) for command in _commands()},
        "recipe": _keys(sparsify.Recipe.model_json_schema()),
    }


def _signatures(name: str) -> dict[str, list[str]]:
    """Return the parameters of a public function, or of a class and its public methods: `name: kind = default` each."""
    thing = getattr(sparsify, name)
    if isinstance(thing, type) and issubclass(thing, Exception):
        return {name: [f"is a {parent.__name__}" for parent in thing.__mro__[1:-1]]}
    found = {name: _parameters(thing)}
    if inspect.isclass(thing):
        for key, member in vars(thing).items():
            if not key.startswith("_") and inspect.isfunction(getattr(member, "__func__", member)):
                found[f"{name}.{key}"] = _parameters(getattr(member, "__func__", member))
    return found


def _parameters(function: Any) -> list[str]:
    return [
        f"{parameter.name}: {parameter.kind.description}"
        + ("" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}")
        for parameter in inspect.signature(function).parameters.values()
    ]


def _help(arguments: list[str]) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main([*arguments, "--help"])
    return text.getvalue()


def _commands() -> list[str]:
    return sorted(re.findall(r"^    ([a-z]+)(?: |$)", _help([]), flags=re.MULTILINE))


def _options(arguments: list[str]) -> list[str]:
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", _help(arguments))))


def _keys(schema: dict[str, Any]) -> dict[str, list[str]]:
    models = {"Recipe": schema, **schema.get("$defs", {})}
    return {name: sorted(model["properties"]) for name, model in models.items() if "properties" in model}


if __name__ == "__main__":
    print(json.dumps(interface(), indent=1))

"""YAML files, read with the line of every key, and with variables put in; errors name file, line and key.

Only plain YAML is read: no tags, no anchors (a few can stand for gigabytes), no key twice.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from sparsify.errors import RecipeError

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]
KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
_TOO_DEEP = f"more than {MAX_DEPTH} levels deep; that is no recipe"
MAX_NUMBER = 100  # characters; a longer one takes longer to read than any recipe, and means none of its digits
MAX_VALUES = 50_000  # keys too, and each variable where it is used
_MAX_NAMES, _MAX_LETTERS = 200, 100  # of the candidates for a misspelt word; the time is their product

#: The parser in C, if PyYAML has it: seconds less for a file of the largest size.
_Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_OPENING = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)

#: Surprises of YAML 1.1, the version of PyYAML: 2:4 would be 124 (base 60), and 1e-3 a text.
_BASE_60 = re.compile(r"[-+]?\d+(:\d+)+(\.\d*)?")
_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


@dataclass(frozen=True)
class YamlFile:
    """The content of a file, and the line of each key or item in it (1 for the first)."""

    path: str
    content: Value
    lines: Mapping[KeyPath, int]

    def error(self, place: KeyPath, message: str) -> RecipeError:
        """Return an error with this file, the line and the key."""
        known = place
        while known not in self.lines:
            known = known[:-1]
        key = ".".join(map(str, place))
        return RecipeError(
            f"{self.path}, line {self.lines[known]}{', ' + cut(key) if key else ''}: {cut(message, 1000)}"
        )


def read_yaml(path: str | os.PathLike[str]) -> YamlFile:
    """Read a file. Raises RecipeError if it is no plain YAML, OSError if it cannot be opened."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no recipe {path}")
    with open(file, "rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: over {MAX_BYTES} bytes; that is no recipe")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: no valid YAML: {error}") from None
    return read_text(text, str(path))


def read_text(text: str, path: str) -> YamlFile:
    """Read YAML outside of a file, such as a value on the command line; `path` stands for it in errors."""
    try:
        _check_tokens(text, path)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        if "nesting depth" in str(error.problem):  # the parser in C looks ahead, and has a limit of its own
            raise RecipeError(f"{path}, line {line}: {_TOO_DEEP}") from None
        raise RecipeError(f"{path}, line {line}: no valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: no valid YAML: {error}") from None
    lines: dict[KeyPath, int] = {(): 1}
    content = None if node is None else _build(node, (), lines, path, yaml.SafeLoader(""))
    return YamlFile(path, content, lines)


def _check_tokens(text: str, path: str) -> None:
    """Refuse tags and anchors, and depths and lengths with a reading time of seconds."""
    depth = n_values = 0
    for token in yaml.scan(text, Loader=_Loader):
        line = token.start_mark.line + 1
        if isinstance(token, (yaml.AnchorToken, yaml.AliasToken, yaml.TagToken)):
            raise RecipeError(f"{path}, line {line}: anchors, aliases and tags are not read; use vars and ${{name}}")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        n_values += isinstance(token, (yaml.ScalarToken, *_OPENING))
        if n_values > MAX_VALUES:
            raise RecipeError(f"{path}, line {line}: over {MAX_VALUES} values; that is no recipe")
        if depth > MAX_DEPTH:
            raise RecipeError(f"{path}, line {line}: {_TOO_DEEP}")


def substitute(file: YamlFile, content: Value, variables: Mapping[str, Value]) -> Value:
    """Replace each string "${name}", of nothing else, by the variable of that name.

    Raises RecipeError for an unknown one, and for more than MAX_VALUES values in the result.
    """
    sizes = {name: sum(1 for _ in nested_values(value)) for name, value in variables.items()}
    n_left = MAX_VALUES

    def replace(value: Value, place: KeyPath) -> Value:
        nonlocal n_left
        n_left -= 1
        if isinstance(value, dict):
            return {key: replace(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item, (*place, i)) for i, item in enumerate(value)]
        if isinstance(value, str) and (match := re.fullmatch(r"\$\{([^}]*)\}", value)):
            if match[1] not in variables:
                raise file.error(place, f"there is no variable {match[1]!r}{nearest(match[1], variables)}")
            n_left -= sizes[match[1]]
            if n_left < 0:
                raise file.error(place, f"over {MAX_VALUES} values, with its variables put in; that is no recipe")
            return variables[match[1]]
        if isinstance(value, str) and "${" in value:
            raise file.error(place, f"a variable stands alone in its value, got {value!r}")
        return value

    return replace(content, ())


def nested_values(content: Value) -> Iterator[Value]:
    """Yield a value and all values inside it.

    >>> list(nested_values({"a": [1, "b"]}))
    [{'a': [1, 'b']}, [1, 'b'], 'b', 1]
    """
    todo = [content]
    while todo:
        value = todo.pop()
        yield value
        if isinstance(value, (dict, list)):
            todo += value.values() if isinstance(value, dict) else value


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ..." with the nearest known word, or "; known: ..." with all of them.

    Long words are not compared, and of many known ones only the first are.
    """
    names = [name for name in known if len(name) <= _MAX_LETTERS]
    near = difflib.get_close_matches(word[:_MAX_LETTERS], names[:_MAX_NAMES], n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    more = " ..." if len(names) > _MAX_NAMES else ""
    return f"; known: {', '.join(names[:_MAX_NAMES])}{more}" if names else ""


def cut(text: str, n: int = _MAX_LETTERS) -> str:
    """Return a text for a message: a longer one than n letters ends in dots.

    >>> cut("a long word", 6)
    'a long...'
    """
    return text if len(text) <= n else f"{text[:n]}..."


def _build(node: yaml.Node, place: KeyPath, lines: dict[KeyPath, int], path: str, loader: yaml.SafeLoader) -> Value:
    """Turn a node into plain values, noting lines."""
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Value] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{path}, line {line}: a key must be a plain word")
            key = key_node.value
            if key in result:
                raise RecipeError(f"{path}, line {line}: the key {cut(key)!r} stands twice in one place")
            lines[(*place, key)] = line
            result[key] = _build(value_node, (*place, key), lines, path, loader)
        return result
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*place, i)] = item.start_mark.line + 1
        return [_build(item, (*place, i), lines, path, loader) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    line = node.start_mark.line + 1
    if node.tag in _NUMBERS and len(node.value) > MAX_NUMBER:
        raise RecipeError(
            f"{path}, line {line}: cannot read a number of {len(node.value)} characters; write it shorter"
        )
    if not node.style and len(node.value) <= MAX_NUMBER:  # plain: None, or "" by the parser in C
        if _BASE_60.fullmatch(node.value):
            return str(node.value)
        if _EXPONENT.fullmatch(node.value):
            return float(node.value)
    try:
        value = loader.construct_object(node)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}, line {line}: cannot read {cut(node.value)!r}: {error}") from None
    if value is not None and not isinstance(value, (bool, int, float, str)):
        return str(node.value)  # a date, say, is text here
    return value

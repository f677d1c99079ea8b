"""Read a YAML file together with the line of every key, put variables in, and say what is wrong where.

Only plain YAML is read: no tags, no anchors (a few of which can stand for gigabytes), no key twice.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from sparsify.errors import RecipeError

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]
Place = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_DEPTH = 50

_OPENING = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)

#: Where YAML 1.1, which PyYAML reads, is not what anyone means: 2:4 would be 124 (base 60), and 1e-3 a text.
_BASE_60 = re.compile(r"[-+]?\d+(:\d+)+(\.\d*)?")
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class YamlFile:
    """The content of a file, and the line on which each key or item of it begins (1 for the first)."""

    path: str
    content: Value
    lines: Mapping[Place, int]

    def error(self, place: Place, message: str) -> RecipeError:
        """Make the error that names this file, the line and the key."""
        known = place
        while known not in self.lines:
            known = known[:-1]
        key = ".".join(map(str, place))
        return RecipeError(f"{self.path}, line {self.lines[known]}{', ' + key if key else ''}: {message}")


def read_yaml(path: str | os.PathLike[str]) -> YamlFile:
    """Read a file. Raises RecipeError if it is no plain YAML, OSError if it cannot be opened."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no recipe {path}")
    if file.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path}: over {MAX_BYTES} bytes; that is no recipe")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: no valid YAML: {error}") from None
    return read_text(text, str(path))


def read_text(text: str, path: str) -> YamlFile:
    """Read YAML that is no file, such as a value on the command line; `path` stands for it in errors."""
    try:
        _check_tokens(text, path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}, line {line}: no valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: no valid YAML: {error}") from None
    lines: dict[Place, int] = {(): 1}
    content = None if node is None else _build(node, (), lines, path)
    return YamlFile(path, content, lines)


def _check_tokens(text: str, path: str) -> None:
    """Refuse what is not plain, and depths that the parser would take seconds for."""
    depth = 0
    for token in yaml.scan(text):
        line = token.start_mark.line + 1
        if isinstance(token, (yaml.AnchorToken, yaml.AliasToken, yaml.TagToken)):
            raise RecipeError(f"{path}, line {line}: anchors, aliases and tags are not read; use vars and ${{name}}")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > MAX_DEPTH:
            raise RecipeError(f"{path}, line {line}: more than {MAX_DEPTH} levels deep; that is no recipe")


def substitute(file: YamlFile, content: Value, variables: Mapping[str, Value], place: Place = ()) -> Value:
    """Replace each string that is exactly "${name}" by the variable of that name.

    Raises RecipeError for an unknown one.
    """
    if isinstance(content, dict):
        return {key: substitute(file, value, variables, (*place, key)) for key, value in content.items()}
    if isinstance(content, list):
        return [substitute(file, value, variables, (*place, i)) for i, value in enumerate(content)]
    if isinstance(content, str) and (found := re.fullmatch(r"\$\{([^}]*)\}", content)):
        if found[1] not in variables:
            raise file.error(place, f"there is no variable {found[1]!r}{nearest(found[1], variables)}")
        return variables[found[1]]
    if isinstance(content, str) and "${" in content:
        raise file.error(place, f"a variable stands alone in its value, got {content!r}")
    return content


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ..." with the nearest known word, or "; known: ..." with all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}" if known else ""


def _build(node: yaml.Node, place: Place, lines: dict[Place, int], path: str) -> Value:
    """Turn a node into plain values, noting lines."""
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Value] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{path}, line {line}: a key must be a plain word")
            key = key_node.value
            if key in result:
                raise RecipeError(f"{path}, line {line}: the key {key!r} stands twice in one place")
            lines[(*place, key)] = line
            result[key] = _build(value_node, (*place, key), lines, path)
        return result
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*place, i)] = item.start_mark.line + 1
        return [_build(item, (*place, i), lines, path) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    if node.style is None and _BASE_60.fullmatch(node.value):
        return str(node.value)
    if node.style is None and _EXPONENT.fullmatch(node.value):
        return float(node.value)
    loader = yaml.SafeLoader("")
    try:
        value = loader.construct_object(node)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}, line {node.start_mark.line + 1}: cannot read {node.value!r}: {error}") from None
    if value is not None and not isinstance(value, (bool, int, float, str)):
        return str(node.value)  # a date, say, is text here
    return value

"""Regular expressions over names, in a time that is proportional to the lengths of both.

Python's `re` tries one way after another: (a+)+b takes 2^n of them on n letters. Here a part of an expression maps all
places of the name where it may begin to all places where it may end, and no place is looked at twice.

Thompson 1968, Regular expression search algorithm.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

MAX_LETTERS = 10_000

# Python's own, so that an expression means what it means to `re`.
_parser: Any = importlib.import_module("re._parser")
_compiler: Any = importlib.import_module("re._compiler")

_UNREAD = {
    "GROUPREF": "backreference",
    "GROUPREF_EXISTS": "conditional group",
    "ATOMIC_GROUP": "atomic group",
    "POSSESSIVE_REPEAT": "possessive quantifier",
}

#: From a name and the places where a part may begin to the places where it may end.
Part = Callable[[str, frozenset[int]], frozenset[int]]


def compile_expression(text: str) -> Callable[[str], bool]:
    r"""Return a function that says whether a regular expression matches a whole name, as `re.fullmatch` does.

    Raises ValueError for a text that is no expression, that is too long or too deep, or that needs to know what a group
    has matched: backreferences, atomic groups and possessive quantifiers.

    >>> matches = compile_expression(r"(\w+\.)+fc[12]")
    >>> matches("encoder.0.fc1"), matches("encoder" * 20)
    (True, False)
    """
    if len(text) > MAX_LETTERS:
        raise ValueError(f"a regular expression of {len(text)} letters, and {MAX_LETTERS} are the most")
    try:
        re.compile(text)
        tree = _parser.parse(text)
        whole = _sequence(tree, tree.state.flags)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{text[:100]!r} is no valid regular expression: {error}") from None
    except NotImplementedError as error:
        raise ValueError(f"{text[:100]!r} has a part that is not read here: {error}; write it without") from None
    except RecursionError:
        raise ValueError(f"{text[:100]!r} ... has too many brackets in brackets") from None
    return lambda name: len(name) in whole(name, frozenset({0}))


def _sequence(tree: Any, flags: int) -> Part:
    parts = [_part(operator, value, flags, tree.state) for operator, value in tree]

    def ends(name: str, begins: frozenset[int]) -> frozenset[int]:
        for part in parts:
            if not begins:
                break
            begins = part(name, begins)
        return begins

    return ends


def _part(operator: Any, value: Any, flags: int, state: Any) -> Part:
    kind = str(operator)
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, inner = value
        return _repeat(_sequence(inner, flags), least, most)
    if kind == "BRANCH":
        return _branch([_sequence(inner, flags) for inner in value[1]])
    if kind == "SUBPATTERN":
        _, added, removed, inner = value
        return _sequence(inner, (flags | added) & ~removed)
    if kind in ("ASSERT", "ASSERT_NOT"):
        direction, inner = value
        behind = inner.getwidth()[0] if direction < 0 else 0
        return _look(_sequence(inner, flags), behind, wanted=kind == "ASSERT")
    if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
        return _single(_compiler.compile(_parser.SubPattern(state, [(operator, value)]), flags))
    raise NotImplementedError(_UNREAD.get(kind, kind.lower()))


def _single(expression: re.Pattern[str]) -> Part:
    """Match one letter or an edge between two, by `re` itself."""

    def ends(name: str, begins: frozenset[int]) -> frozenset[int]:
        found = (expression.match(name, begin) for begin in begins)
        return frozenset(match.end() for match in found if match)

    return ends


def _branch(parts: Sequence[Part]) -> Part:
    return lambda name, begins: frozenset[int]().union(*(part(name, begins) for part in parts))


def _repeat(part: Part, least: int, most: int) -> Part:
    def ends(name: str, begins: frozenset[int]) -> frozenset[int]:
        for _ in range(least):
            after = part(name, begins)
            if after == begins:  # empty, or a part that may match nothing
                break
            begins = after
        found, new, n = begins, begins, least
        while new and n < most:
            new = part(name, new) - found
            found |= new
            n += 1
        return found

    return ends


def _look(part: Part, behind: int, *, wanted: bool) -> Part:
    """Keep the places before which, or after which, a part matches, or does not."""

    def holds(name: str, place: int) -> bool:
        ends = part(name, frozenset({place - behind})) if place >= behind else frozenset()
        return place in ends if behind else bool(ends)

    return lambda name, begins: frozenset(place for place in begins if holds(name, place) == wanted)

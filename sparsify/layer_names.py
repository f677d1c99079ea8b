"""Choice of layers by globs, `re:` patterns, types and functions, with an error for a selector without a match."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import regex
from torch import nn

#: A glob over dotted names ("encoder.*.query"); "re:" and a regular expression for the whole name; ":first" or ":last",
#: in the order of the model's modules; a module type, for every layer of the type, or inside a module of the type; or a
#: function of a layer's name and module to true or false.
Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]

#: Patterns for one layer by its place, and the part of the names that each means.
_ENDS = {":first": slice(None, 1), ":last": slice(-1, None)}

#: Processor time of one regular expression for all names together.
MAX_MATCH_S = 1.0

#: Letters of one regular expression with its required repetitions written out, as `regex` compiles them.
MAX_LETTERS = 50_000


def join(*names: str) -> str:
    """Join names with dots, without the empty name of the root.

    >>> join("", "0", "weight")
    '0.weight'
    """
    return ".".join(name for name in names if name)


def matching(pattern: str, names: Collection[str]) -> list[str]:
    """Return the names matched by a glob or `re:` pattern, or the ":first" or ":last" of them.

    Raises ValueError with near names if there are none.

    >>> matching("*.fc1", ["a.fc1", "a.fc2"]), matching(r"re:a\\.fc\\d", ["a.fc1", "a.fc2"])
    (['a.fc1'], ['a.fc1', 'a.fc2'])
    """
    if pattern in _ENDS:
        matches = list(names)[_ENDS[pattern]]
    elif pattern.startswith("re:"):
        matches = _matching_expression(pattern[3:], names)
    else:
        matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matches:
        raise ValueError(f"{pattern!r} matches no layer; {_near(pattern, names)}")
    return matches


def select(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
) -> list[str]:
    """Return the names of `layers` selected by any `include` (None: all) and no `exclude`, in the model's order.

    layers: by name, the module of that name or around it ("attention.q_proj" of an attention not yet unfused). A layer
    used in several places answers to each of its names. Raises ValueError for a selector without a layer, and for a
    choice without any.
    """
    names_of: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(id(module), []).append(name)
    aliases: dict[str, str] = {}
    for name, layer in layers.items():
        first, *others = names_of.get(id(layer), [name])
        aliases |= {other + name[len(first) :]: name for other in (first, *others)}

    def meant(selectors: Selector | Sequence[Selector] | None) -> set[str]:
        selected: set[str] = set()
        for selector in _as_sequence(selectors):
            if isinstance(selector, str):
                selected |= {aliases[alias] for alias in matching(selector, aliases)}
            elif isinstance(selector, type):
                selected |= _of_type(selector, model, layers)
            else:
                selected |= _by_function(selector, layers)
        return selected

    chosen = set(layers) if include is None else meant(include)
    chosen -= meant(exclude)
    if layers and not chosen:
        raise ValueError(f"include={include!r} and exclude={exclude!r} leave no layer")
    return [name for name in layers if name in chosen]


def _matching_expression(text: str, names: Iterable[str]) -> list[str]:
    """Return the names matched by a regular expression as a whole.

    Raises ValueError for a text that is no expression, and for a pattern too long or too slow.
    """
    expression = _compile(text)
    end = time.process_time() + MAX_MATCH_S
    try:  # a timeout must be positive
        return [name for name in names if expression.fullmatch(name, timeout=max(end - time.process_time(), 1e-6))]
    except TimeoutError:
        raise ValueError(
            f"{text[:100]!r} takes more than {MAX_MATCH_S:g} s to match; write it without repetitions in repetitions"
        ) from None


def _compile(text: str) -> regex.Pattern[str]:
    counts = [int(count) for count in re.findall(r"\{(\d{1,9})", text)]
    if len(text) * math.prod(max(count, 1) for count in counts) > MAX_LETTERS:
        raise ValueError(
            f"{text[:100]!r} ... has over {MAX_LETTERS} letters with its repetitions written out; write a shorter one"
        )
    try:
        return regex.compile(text)
    except (regex.error, ValueError, OverflowError) as error:
        raise ValueError(f"{text[:100]!r} is no valid regular expression: {error}") from None
    except RecursionError:
        raise ValueError(f"{text[:100]!r} ... has too many brackets in brackets") from None


def _as_sequence(selectors: Selector | Sequence[Selector] | None) -> Sequence[Selector]:
    if selectors is None:
        return ()
    sequence = tuple(selectors) if isinstance(selectors, Iterable) and not isinstance(selectors, str) else (selectors,)
    for selector in sequence:
        valid = (
            issubclass(selector, nn.Module)
            if isinstance(selector, type)
            else callable(selector) and not isinstance(selector, nn.Module)
        )
        if not isinstance(selector, str) and not valid:
            raise TypeError(
                f"a pattern, a module type or a function (name, module) -> bool selects layers, got {selector!r}"
            )
    return sequence


def _of_type(kind: type[nn.Module], model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    inside = {id(child) for module in model.modules() if isinstance(module, kind) for child in module.modules()}
    names = {name for name, layer in layers.items() if id(layer) in inside}
    if not names:
        types = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(f"type {kind.__name__} matches no layer; the model has: {', '.join(types)}")
    return names


def _by_function(choose: Callable[[str, nn.Module], bool], layers: Mapping[str, nn.Module]) -> set[str]:
    name_of = getattr(choose, "__name__", repr(choose))
    names = set()
    for name, layer in layers.items():
        answer = choose(name, layer)
        if not isinstance(answer, bool):
            raise TypeError(f"{name_of}({name!r}, {type(layer).__name__}) must return True or False, got {answer!r}")
        if answer:
            names.add(name)
    if not names:
        raise ValueError(f"{name_of} chose none of the {len(layers)} layers")
    return names


def _near(pattern: str, names: Iterable[str]) -> str:
    names = list(names)
    if inside := [name for name in names if name.startswith(f"{pattern}.")]:
        return f"for the {len(inside)} layers inside {pattern!r} write {pattern + '.*'!r}"
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return f"near names: {', '.join(map(repr, near))}" if near else "there is no layer to choose from"

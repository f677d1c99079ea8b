"""Errors for layers without information: neither data nor training gives a method anything to choose by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_N_NAMED = 20


def refuse_unseen(reasons: Mapping[str, str], remedy: str) -> None:
    """Raise ValueError, naming them all, for layers without information, each with a reason.

    All scores of such a layer are the same, and the position of a weight alone would decide. The remedy names the way
    out in a few words.

    >>> refuse_unseen({"expert.up": "got no rows", "expert.down": "got no rows"}, "give data that reaches them")
    Traceback (most recent call last):
    ValueError: expert.up, expert.down: got no rows, so that their position alone would choose what is removed; give data that reaches them, or leave them dense with exclude=['expert.up', 'expert.down']
    """  # noqa: E501
    if not reasons:
        return
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name or "(root)")
    layers = "; ".join(f"{named(names)}: {reason}" for reason, names in grouped.items())
    raise ValueError(
        f"{layers}, so that their position alone would choose what is removed; {remedy}, "
        f"or leave them dense with exclude=[{named([repr(name) for name in reasons])}]"
    )


def named(names: Iterable[str]) -> str:
    """List names in a sentence, the first twenty of them.

    >>> named(["a", "b"])
    'a, b'
    """
    listed = list(names)
    more = [f"... ({len(listed) - _N_NAMED} more)"] if len(listed) > _N_NAMED else []
    return ", ".join(listed[:_N_NAMED] + more)

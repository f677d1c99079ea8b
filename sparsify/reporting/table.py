"""Tables of text for people."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence

#: A column of words is cut to no fewer letters than these.
FEWEST_LETTERS = 12


def table(lines: Sequence[Sequence[str]], *, left: Collection[str] = (), width: int | None = None) -> str:
    """Return rows of text in columns, with a rule under the head.

    The first column and those named in `left` are left-aligned, the others right-aligned.
    width: letters of a line at most; the longest columns of words are cut to fit, in their middle. A table with too
        many numbers for the width stays wider.

    >>> print(table([("a", "n"), ("long", "1")]))
    a     n
    -------
    long  1
    >>> print(table([("layer", "n"), ("encoder.layer.0.dense", "1")], width=17))
    layer           n
    -----------------
    encode...dense  1
    """
    words = {i for i, name in enumerate(lines[0]) if i == 0 or name in left}
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    if width is not None:
        _shrink(widths, words, width)
    text = []
    for line in lines:
        cells = [cut(cell, n) for cell, n in zip(line, widths, strict=True)]
        padded = (c.ljust(n) if i in words else c.rjust(n) for i, (c, n) in enumerate(zip(cells, widths, strict=True)))
        text.append("  ".join(padded).rstrip())
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def cut(text: str, n: int) -> str:
    """Return a text of at most n letters: dots take the place of the middle.

    >>> cut("encoder.layer.0.dense", 14), cut("short", 14)
    ('encode...dense', 'short')
    """
    if len(text) <= n:
        return text
    tail = max((n - 2) // 2, 0)
    return f"{text[: n - 2 - tail]}..{text[len(text) - tail :]}"


def html_table(lines: Sequence[Sequence[str]]) -> str:
    """Return rows of text as an HTML table.

    >>> html_table([("a",), ("<1>",)])
    '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;1&gt;</td></tr></tbody></table>'
    """
    head, *rows = [[html.escape(cell) for cell in line] for line in lines]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead><tbody>{body}</tbody></table>"


def _shrink(widths: list[int], words: Collection[int], width: int) -> None:
    """Take letters from the longest columns of words until a line fits, or all of them are at their fewest."""
    while (excess := sum(widths) + 2 * (len(widths) - 1) - width) > 0:
        longest = max(words, key=lambda i: widths[i])
        if widths[longest] <= FEWEST_LETTERS:
            return
        second = max((widths[i] for i in words if i != longest), default=0)
        widths[longest] -= min(excess, max(widths[longest] - max(second, FEWEST_LETTERS), 1))

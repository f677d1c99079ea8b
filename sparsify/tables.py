"""Results as text for people: a summary, then tables; in print, within the width of a terminal, or in a notebook."""

from __future__ import annotations

import html
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

#: A column of words is cut to no fewer letters than this while other columns can be left out, and then to these.
COMFORTABLE, FEWEST_LETTERS = 24, 12

#: A line of text with its part in a listing: "summary", "head", "rule", "row" or "note".
Line = tuple[str, str]


@dataclass(frozen=True)
class Table:
    """Rows of text in columns, with a rule under the head.

    The first column and those named in `left` hold words and are left-aligned, the others right-aligned.
    spare: columns to leave out, in this order, where a width is too small for all of them.

    >>> print(Table(("a", "n"), [("long", "1")]).text())
    a     n
    -------
    long  1
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[str] = ()
    spare: Sequence[str] = ()

    def text(self, width: int | None = None) -> str:
        """Return the lines of the table, of at most `width` letters each.

        The longest columns of words are cut to fit, in their middle; then spare columns are left out, and named in
        the last line. A table with too many numbers for the width stays wider.

        >>> print(Table(("layer", "n"), [("encoder.layer.0.dense", "1")]).text(17))
        layer           n
        -----------------
        encode...dense  1
        """
        return "\n".join(text for _, text in self.lines(width))

    def lines(self, width: int | None = None) -> Iterator[Line]:
        """Yield the lines of the table, as `text` has them."""
        widths = self._widths(width)
        words = self._words()
        text = []
        for row in (self.head, *self.rows):
            cells = [(i, cut(row[i], n), n) for i, n in widths.items()]
            text.append("  ".join(c.ljust(n) if i in words else c.rjust(n) for i, c, n in cells).rstrip())
        yield "head", text[0]
        yield "rule", "-" * max(map(len, text))
        for line in text[1:]:
            yield "row", line
        if left_out := [name for i, name in enumerate(self.head) if i not in widths]:
            for line in wrapped(f"left out for the width: {', '.join(left_out)}", width):
                yield "note", line

    def html(self) -> str:
        """Return the table as HTML.

        >>> Table(("a",), [("<1>",)]).html()
        '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;1&gt;</td></tr></tbody></table>'
        """
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _words(self) -> set[int]:
        return {i for i, name in enumerate(self.head) if i == 0 or name in self.left}

    def _widths(self, width: int | None) -> dict[int, int]:
        """Return the columns to show, each with its letters."""
        widths = {i: max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))}
        if width is None:
            return widths

        def excess(fewest: int) -> int:
            shortest = (min(n, fewest) if i in words else n for i, n in widths.items())
            return sum(shortest) + 2 * (len(widths) - 1) - width

        words = self._words()
        for name in self.spare:
            if excess(COMFORTABLE) <= 0:
                break
            widths = {i: n for i, n in widths.items() if self.head[i] != name}
        _shrink(widths, words & widths.keys(), width, COMFORTABLE if excess(COMFORTABLE) <= 0 else FEWEST_LETTERS)
        return widths


@dataclass(frozen=True)
class Listing:
    """A result for people: the sentences that sum it up, then tables, each with a title or ""."""

    summary: Sequence[str]
    tables: Sequence[tuple[str, Table]]

    def text(self, width: int | None = None) -> str:
        """Return the lines of the listing, cut and wrapped to `width` letters.

        >>> print(Listing(["one layer"], [("", Table(("layer", "n"), [("0", "1")]))]).text())
        one layer
        <BLANKLINE>
        layer  n
        --------
        0      1
        """
        return "\n".join(text for _, text in self.lines(width))

    def lines(self, width: int | None = None) -> Iterator[Line]:
        """Yield the lines of the listing."""
        for sentence in self.summary:
            for line in wrapped(sentence, width):
                yield "summary", line
        for number, (title, table) in enumerate(self.tables):
            if number or self.summary:
                yield "row", ""
            if title:
                yield "summary", title
            yield from table.lines(width)

    def html(self) -> str:
        """Return the listing as HTML."""
        summary = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.summary)
        titled = ((f"<p>{html.escape(title)}</p>" if title else "") + table.html() for title, table in self.tables)
        return summary + "".join(titled)


class Listed(ABC):
    """The contract of a result that people look at: `str()` and notebooks show its listing."""

    @abstractmethod
    def listing(self) -> Listing:
        """Return the summary and the tables."""

    def __str__(self) -> str:
        return self.listing().text()

    def _repr_html_(self) -> str:
        """Show the listing in a notebook."""
        return self.listing().html()


def wrapped(sentence: str, width: int | None) -> list[str]:
    """Return a sentence in lines of at most `width` letters, if its words allow."""
    if width is None or len(sentence) <= width:
        return [sentence]
    return textwrap.wrap(sentence, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def cut(text: str, n: int) -> str:
    """Return a text of at most n letters: dots take the place of the middle.

    >>> cut("encoder.layer.0.dense", 14), cut("short", 14)
    ('encode...dense', 'short')
    """
    if len(text) <= n:
        return text
    tail = max((n - 2) // 2, 0)
    return f"{text[: n - 2 - tail]}..{text[len(text) - tail :]}"


def _shrink(widths: dict[int, int], words: Collection[int], width: int, fewest: int) -> None:
    """Take letters from the longest columns of words until a line fits, or all of them are at their fewest."""
    while (excess := sum(widths.values()) + 2 * (len(widths) - 1) - width) > 0:
        longest = max(words, key=lambda i: widths[i])
        if widths[longest] <= fewest:
            return
        second = max((widths[i] for i in words if i != longest), default=0)
        widths[longest] -= min(excess, max(widths[longest] - max(second, fewest), 1))

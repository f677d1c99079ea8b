"""Lines of generated pages, at most as wide as those written by hand."""

import textwrap

WIDTH = 118


def filled(text: str) -> str:
    """Break a paragraph, or an item of a list, into lines.

    >>> print(filled("- " + "word " * 24))
    - word word word word word word word word word word word word word word word word word word word word word word word
      word
    """
    indent, words = "  " if text.startswith("- ") else "", " ".join(text.split())
    return textwrap.fill(words, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

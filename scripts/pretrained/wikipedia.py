"""Articles of the English Wikipedia as plain text, for calibration: `scripts/assets.py wikipedia` fetches them."""

import bz2
import html
import re

from assets import ASSETS, PACKAGES

FILE = ASSETS / "wikipedia" / next(iter(PACKAGES["wikipedia"].sha256))
_SHORTEST = 500  # letters: what is less is a redirection

#: What goes, and what stays in its place, in this order.
_MARKUP = (
    (r"(?s)<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->|<[^>]+>", " "),
    (r"(?s)\{\|.*?\|\}", " "),
    *((r"\{\{[^{}]*\}\}", " "),) * 4,  # templates inside templates
    (r"\[\[(?:File|Image|Category)[^\]]*\]\]", " "),
    (r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1"),
    (r"\[https?:\S+ ?([^\]]*)\]", r"\1"),
    (r"'{2,}", ""),
    (r"(?m)^[=*#:;|!{].*$", " "),
    (r"\s+", " "),
)


def articles() -> list[str]:
    """Read the articles: of each its prose, without tables, lists and notes."""
    pages = re.findall(r"(?s)<text[^>]*>(.*?)</text>", bz2.decompress(FILE.read_bytes()).decode())
    texts = [_plain(html.unescape(html.unescape(page))) for page in pages]
    return [text for text in texts if len(text) > _SHORTEST]


def _plain(text: str) -> str:
    for pattern, instead in _MARKUP:
        text = re.sub(pattern, instead, text)
    return text.strip()

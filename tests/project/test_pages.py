"""The pages hold together: width, links, the index, the paths and names that they mention, the commands they show."""

import re
import shlex
from pathlib import Path

import pytest

from sparsify.cli.parser import make_parser

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 120
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "sparsify/csrc/README.md", *DOCS]
#: Places in which a path of a page may begin.
BEGINNINGS = (ROOT, ROOT / "sparsify", ROOT / "docs", ROOT / "scripts")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> list[str]:
    """Return the lines of a page that are neither code nor rows of a table."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [line for line in text.splitlines() if not line.startswith(("    ", "|"))]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, made as GitHub makes them."""
    headings = [line.lstrip("#").strip() for line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Return the targets of a page's links that are relative."""
    found = re.findall(r"\]\(([^)\s]+)\)", "\n".join([*prose(page), *page.read_text().splitlines()]))
    return [link for link in dict.fromkeys(found) if "://" not in link]


@every_page
def test_prose_is_at_most_120_columns_wide(page: Path) -> None:
    assert not [line for line in prose(page) if len(line) > WIDTH]


@every_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_links_every_page() -> None:
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links(ROOT / "docs/index.md")}
    assert linked >= {page for page in DOCS if page.name != "index.md"}


@pytest.mark.parametrize("name", ["architecture", "decisions", "limits", "formats"])
def test_paths_and_names_of_code_are_there(name: str) -> None:
    """`masking/masks.py` is a file, and `masking/masks.py` (`make_masks`) defines that name."""
    text = " ".join((ROOT / f"docs/{name}.md").read_text().split())
    for path, names in re.findall(r"`([\w./-]+\.(?:py|cpp|h|md))`(?: \(((?:`\w+`(?:, )?)+)\))?", text):
        files = [beginning / path for beginning in BEGINNINGS if (beginning / path).is_file()]
        assert files, path
        for word in re.findall(r"\w+", names):
            assert re.search(rf"^(?: {{4}})?(?:(?:def|class) {word}\b|{word}\b.*=)", files[0].read_text(), re.MULTILINE)


def test_the_tree_shows_every_package_and_no_file_that_is_gone() -> None:
    tree = (ROOT / "docs/architecture.md").read_text().partition("```tree\n")[2].partition("```")[0]
    shown: list[str] = []
    folder = ""
    for line in tree.splitlines():
        path = line.split()[0]
        if not line.startswith(" "):
            assert path == "sparsify/"
            continue
        if not line.startswith("    "):
            folder = path if path.endswith("/") else ""
        shown.append(path if path == folder or not folder else folder + path)
    assert shown
    missing = [path for path in shown if not (ROOT / "sparsify" / path).exists()]
    assert not missing
    packages = {f"{file.parent.name}/" for file in (ROOT / "sparsify").glob("*/__init__.py")}
    assert packages <= set(shown)


def commands(page: Path) -> list[str]:
    """Return the arguments of each line of code that calls sparsify."""
    blocks = re.findall(r"^```sh\n(.*?)^```|((?:^ {4}[^\n]*\n)+)", page.read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r"^(?: {4})?sparsify (.*)$", "\n".join(map("".join, blocks)), re.MULTILINE)


@every_page
def test_every_command_is_one_that_sparsify_knows(page: Path) -> None:
    for line in commands(page):
        assert make_parser().parse_args(shlex.split(line, comments=True)).run


def test_commands_are_seen() -> None:
    """The check above would pass if it saw no command."""
    for name, fewest in (("README.md", 1), ("docs/guide.md", 3), ("docs/cli.md", 8), ("docs/recipes.md", 4)):
        assert len(commands(ROOT / name)) >= fewest, name

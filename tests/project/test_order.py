"""The suite's files that take longest come first."""

from pathlib import Path
from types import SimpleNamespace

import order

TESTS = Path(__file__).resolve().parents[1]


def test_the_longest_files_are_there() -> None:
    assert [name for name in order.LONGEST if not (TESTS / name).is_file()] == []


def test_the_longest_files_come_first_and_nothing_else_moves() -> None:
    files = ["cli/test_help.py", order.LONGEST[1], "cli/test_cli.py", order.LONGEST[0], "cli/test_cli.py"]
    items = [SimpleNamespace(path=TESTS / name, number=number) for number, name in enumerate(files)]
    assert [item.number for item in order.longest_first(items)] == [3, 1, 0, 2, 4]

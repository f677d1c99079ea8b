"""The whole flow on every architecture of the zoo, in small: docs/models.md is the same table for a reader."""

import re
from pathlib import Path

import pytest
from architectures import FILES, installed, models
from architectures.checks import CHECKS, Subject

NAMES = [(package, name) for package in installed() for name in models(package)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("package", FILES)
def test_no_package_is_left_out(package: str) -> None:
    if package not in installed():
        pytest.skip(f"{package} is missing: its models were left out; pip install 'sparsify-torch[test]'")
    assert models(package)


@pytest.mark.parametrize("package", installed())
def test_the_page_lists_every_model(package: str) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text()
    assert set(models(package)) <= set(re.findall(r"^\| ([\w.]+) \|", page, re.MULTILINE))
    assert "FAILED" not in page
    assert "not reached" not in page


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[name for _, name in NAMES])
def test_everything_works(package: str, name: str, tmp_path: Path) -> None:
    subject = Subject(models(package)[name], tmp_path)
    for check in CHECKS.values():
        check(subject)

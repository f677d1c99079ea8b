"""The whole flow on every architecture of the zoo, in small: docs/results/models.md is the same table for a reader."""

import re
from pathlib import Path

import pytest
from zoo_models import FILES, models, why_missing
from zoo_models.checks import CHECKS, Subject

HERE = [file for file in FILES if not why_missing(file)]
NAMES = [(file, name) for file in HERE for name, model in models(file).items() if model.quick]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "models.md"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::sparsify.LeftDenseWarning"),
]


@pytest.mark.parametrize("file", FILES)
def test_the_page_lists_every_model_and_no_failure(file: str) -> None:
    if why := why_missing(file):
        pytest.skip(f"its models were left out: {why}")
    page = PAGE.read_text()
    assert set(models(file)) <= set(re.findall(r"^\| (\w[\w. -]*) \|", page, re.MULTILINE))
    assert "FAILED" not in page
    assert "not reached" not in page


@pytest.mark.parametrize(("file", "name"), NAMES, ids=[name for _, name in NAMES])
def test_everything_works(file: str, name: str, tmp_path: Path) -> None:
    subject = Subject(models(file)[name], tmp_path)
    for check in CHECKS.values():
        check(subject)

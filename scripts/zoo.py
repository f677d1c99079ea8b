"""Take every architecture of the zoo through the whole flow, and write docs/results/models.md from the outcomes.

    scripts/zoo.py                     all of them, to docs/results/models.md
    scripts/zoo.py --only swin_t       some of them, printed

tests/scripts/test_zoo.py goes through the same table, but for the slow models; here, a failure becomes a cell.
"""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from zoo_models import FILES, models, page, why_missing
from zoo_models.checks import CHECKS, Subject
from zoo_models.model import Model
from zoo_models.share import Share, share

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "models.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, print or write the table; 1 if any check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="print these alone")
    options = parser.parse_args(argv)
    gone = [why for file in FILES if (why := why_missing(file))]
    chosen = {name: model for file in FILES if not why_missing(file) for name, model in models(file).items()}
    if unknown := sorted(set(options.only or ()) - set(chosen)):
        parser.error(f"{unknown[0]!r} is none of: {', '.join(chosen)}")
    if gone and not options.only:
        parser.error(f"the page has to hold all models, but {gone[0]}")
    torch.set_num_threads(1)
    rows = {}
    for name, model in chosen.items():
        if not options.only or name in options.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows[name] = page.Row(shares(model), check_all(model))
    if options.only:
        print(page.table(rows), page.outcomes(rows), sep="\n\n")
    else:
        PAGE.write_text(page.page(rows))
    return int(any(outcome.startswith(page.FAILED) for row in rows.values() for outcome in row.outcomes.values()))


def shares(model: Model) -> dict[str, Share]:
    """Return the model's share by the arguments of convert: without types=, and with the zoo's if it has some."""
    plain = {key: value for key, value in model.convert.items() if key != "types"}
    return {page.call(arguments): share(model, **arguments) for arguments in (plain, model.convert)}


def check_all(model: Model) -> dict[str, str]:
    """Return the outcome of every check, up to the first failure."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(model, Path(folder))
        for name, check in CHECKS.items():
            try:
                outcomes[name] = check(subject)
            except Exception as error:  # any failure is a finding
                traceback.print_exc()
                outcomes[name] = f"{page.FAILED}: {error}"
                break
    return outcomes


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())

"""The command line: the program `sparsify` and its commands.

Exit codes:
    0: done
    2: wrong arguments, model, data or weights, or a failure of the user's own code
    3: an invalid recipe, or one for another model
    4: an invalid checkpoint
    5: a failure to open or write a file
    130: an interruption from the keyboard
    141: the reader of the output has gone

An error is one line on standard error; --debug prints its traceback too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from sparsify.cli.parser import _budget as _budget
from sparsify.cli.parser import make_parser
from sparsify.cli.printing import note
from sparsify.cli.user_code import sentence
from sparsify.errors import CheckpointError, LeftDenseWarning, RecipeError

#: The code of an error is that of the first type it has.
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (KeyboardInterrupt, 130),
    (BrokenPipeError, 141),
    (RecipeError, 3),
    (CheckpointError, 4),
    (OSError, 5),
    (BaseException, 2),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        arguments = make_parser().parse_args(argv)
    except SystemExit:  # --help, --version, or wrong arguments; the reader of a help may have gone
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError as error:
            return _fail(error, debug=False)
        raise
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", LeftDenseWarning)
            warnings.showwarning = _show_warning
            arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk fails here, and not after the exit code
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # the user's own code may raise or exit
        return _fail(error, arguments.debug)
    return 0


def _fail(error: BaseException, debug: bool) -> int:
    """Print an error in one line, and return its exit code."""
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    with contextlib.suppress(OSError):  # standard error may be gone too
        if debug:
            traceback.print_exception(error)
        if isinstance(error, KeyboardInterrupt):
            print("sparsify: interrupted", file=sys.stderr)
        elif not isinstance(error, BrokenPipeError):
            print(f"sparsify: {sentence(error)}", file=sys.stderr)
    if isinstance(error, OSError):  # Python flushes once more at its end, and would complain again
        with contextlib.suppress(OSError, ValueError, AttributeError):
            _drop_output()
    return code


def _drop_output() -> None:
    """Lead standard output nowhere if the rest of it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    note(str(message))

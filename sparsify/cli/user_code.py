"""A user's own functions, named "package.module:function": found, called, and what they raise told in one sentence.

Such a name runs code: of the module it names, which is looked for in the present folder first.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError, RecipeError

_PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"
_INSTALLED = tuple(f"{sysconfig.get_paths()[key]}{os.sep}" for key in ("stdlib", "purelib", "platlib"))


class UserCodeError(ValueError):
    """A failure of the user's own code, or of what a library read for it. The message names the function or file."""


WAY_OUT = "write package.module:function, importable from here"


def load_function(path: str, what: str, *, way_out: str = WAY_OUT, here: bool = True) -> Callable[..., Any]:
    """Import the function "package.module:function"; a call of it that fails is a ValueError that names `what`.

    here: whether the present folder is searched, before all others, while the module is imported and while the function
    runs. Without it nothing is imported from there, though python -m has put it on the path. Raises ValueError, with
    the way out if there is no such module or function.
    """
    module, _, name = path.partition(":")
    try:
        with _searching(here), blaming(what):
            found = importlib.import_module(module)
    except ValueError as error:
        if not isinstance(error.__cause__, (ImportError, ValueError, TypeError)):
            raise
        raise ValueError(f"{error}; {way_out}") from error.__cause__
    if not callable(function := getattr(found, name, None)):
        raise ValueError(f"{what}: there is no function {name!r} in {module!r}; {way_out}")

    def call(*arguments: Any) -> Any:
        with _searching(here), blaming(what):
            return function(*arguments)

    return call


def iterate(found: Any, what: str) -> Iterator[Any]:
    """Go through what a user's function returned, whose code may run for each item."""
    if isinstance(found, (str, bytes)) or not isinstance(found, Iterable):
        raise ValueError(f"{what}: returned a {type(found).__name__}; return a list or generator of batches")
    return _items(found, what)


def _items(found: Iterable[Any], what: str) -> Iterator[Any]:
    with blaming(what):
        items = iter(found)
    while True:
        with _searching(here=True), blaming(what):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn whatever a user's code raises, an exit too, into a ValueError that names `what`, or an OSError.

    An interruption goes on as it is, and so do errors that name their file themselves.
    """
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit, CheckpointError, RecipeError):
        raise
    except OSError as error:
        raise OSError(f"{what}: {sentence(error)}") from error
    except BaseException as error:
        raise UserCodeError(f"{what}: {sentence(error)}") from error


def sentence(error: BaseException) -> str:
    """Say an error in one line: in its own words where this library raised it, else also its type and its place.

    >>> sentence(KeyError("first.weight"))
    "KeyError: 'first.weight'"
    """
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    except Exception:  # an error of the error
        lines = [""]
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if places and places[-1][0].startswith(_PACKAGE) and isinstance(error, (ValueError, TypeError, OSError)):
        return " ".join(lines)
    text = lines[0] if isinstance(error, OSError) else f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
    own = [(file, line) for file, line in places if not file.startswith((_PACKAGE, "<frozen", *_INSTALLED))]
    return f"{text} ({Path(own[-1][0]).name}, line {own[-1][1]})" if own else text


@contextlib.contextmanager
def _searching(here: bool) -> Iterator[None]:
    """Find modules in the present folder first, or not at all; an installed command looks only elsewhere."""
    folder = os.getcwd()
    if here:
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):  # the user's code may have taken it out
                sys.path.remove(folder)
        return
    hidden = [path for path in sys.path if os.path.realpath(path or folder) == os.path.realpath(folder)]
    sys.path[:] = [path for path in sys.path if path not in hidden]
    try:
        yield
    finally:
        sys.path[:0] = hidden

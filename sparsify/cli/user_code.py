"""A user's own functions, named "package.module:function": their import, their calls, and their errors in one sentence.

Such a name runs code: that of the module, found in the present folder first.
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
    """A failure of the user's own code, or of a library on a user's file. The message names the function or file."""


WAY_OUT = "write package.module:function, importable from here"


def load_function(path: str, label: str, *, way_out: str = WAY_OUT, here: bool = True) -> Callable[..., Any]:
    """Import the function "package.module:function"; a failing call of it raises a ValueError with `label`.

    here: search the present folder before all others, during the import and while the function runs. Without `here`
    nothing is imported from that folder, though python -m has put it on the path. Raises ValueError, with the way out
    if there is no such module or function.
    """
    module, _, name = path.partition(":")
    try:
        with _searching(here), blaming(label):
            imported = importlib.import_module(module)
    except ValueError as error:
        if not isinstance(error.__cause__, (ImportError, ValueError, TypeError)):
            raise
        raise ValueError(f"{error}; {way_out}") from error.__cause__
    if not callable(function := getattr(imported, name, None)):
        raise ValueError(f"{label}: there is no function {name!r} in {module!r}; {way_out}")

    def call(*arguments: Any) -> Any:
        with _searching(here), blaming(label):
            return function(*arguments)

    return call


def iterate(returned: Any, label: str) -> Iterator[Any]:
    """Iterate over the return value of a user's function; its code may run for each item."""
    if isinstance(returned, (str, bytes)) or not isinstance(returned, Iterable):
        raise ValueError(f"{label}: returned a {type(returned).__name__}; return a list or generator of batches")
    return _items(returned, label)


def _items(iterable: Iterable[Any], label: str) -> Iterator[Any]:
    with blaming(label):
        items = iter(iterable)
    while True:
        with _searching(here=True), blaming(label):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@contextlib.contextmanager
def blaming(label: str) -> Iterator[None]:
    """Turn every error of a user's code, an exit too, into a ValueError with `label`, or an OSError.

    An interruption goes on as it is, and so do CheckpointError and RecipeError with their own file names.
    """
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit, CheckpointError, RecipeError):
        raise
    except OSError as error:
        raise OSError(f"{label}: {sentence(error)}") from error
    except BaseException as error:
        raise UserCodeError(f"{label}: {sentence(error)}") from error


def sentence(error: BaseException) -> str:
    """Return an error in one line: the words of an error of this library, else also type and place.

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

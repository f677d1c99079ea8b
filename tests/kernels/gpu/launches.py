"""Launches of kernels, seen from outside: each kernel by its name, with all its arguments."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock


class Launch(NamedTuple):
    """A kernel, and the arguments of one launch of it."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The form (or "epilogue") and the name of the kernel, as `named_kernels` gives it."""
        return next(name for name, kernel in named_kernels().items() if kernel is self.kernel)


def named_kernels() -> dict[str, Any]:
    """Return the kernels that are launched, by form (or "epilogue") and name."""
    from sparsify.kernels.gpu.triton import blocks, epilogue, narrow, tiles

    return {
        "tiles.few": tiles.few,
        "tiles.many": tiles.many,
        "tiles.dense": tiles.dense,
        "narrow.few": narrow.few,
        "narrow.dense": narrow.dense,
        "blocks.multiply": blocks.multiply,
        "epilogue.finish": epilogue.finish,
    }


@contextmanager
def seen(*, run: bool = True, also: Callable[[], object] = lambda: None) -> Iterator[list[Launch]]:
    """List the launches while this lasts, and call `also` at each; without `run` nothing is computed."""
    kind = type(named_kernels()["epilogue.finish"])
    original = kind.__getitem__
    launches: list[Launch] = []

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            launches.append(Launch(kernel, arguments, options))
            also()
            return original(kernel, grid)(*arguments, **options) if run else None

        return launch

    with mock.patch.object(kind, "__getitem__", launcher):
        yield launches

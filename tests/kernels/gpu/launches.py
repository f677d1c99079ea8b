"""What is launched, seen from outside: each kernel by its name, with everything it is given."""

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
        """The form (or "epilogue") and the name of the kernel."""
        return f"{self.kernel.fn.__module__.rsplit('.', 1)[1]}.{self.kernel.fn.__name__}"


@contextmanager
def seen(*, run: bool = True, also: Callable[[], object] = lambda: None) -> Iterator[list[Launch]]:
    """List the launches while this lasts, and call `also` at each; without `run` nothing is computed."""
    from sparsify.kernels.gpu.triton import epilogue as triton_epilogue

    kind = type(triton_epilogue.finish)
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

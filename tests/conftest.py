"""Fixtures of several test files, and the instruction sets of the native kernels that a run has tested."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from order import longest_first
from tested_kernels import TestedKernels

from sparsify.kernels.cpu import library as native

TESTED = pytest.StashKey[TestedKernels]()
DESELECTED = pytest.StashKey[bool]()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: small products are faster without a second."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(params=native.known_kernels() or ["native kernels"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each instruction set that this processor has; the others are skipped with the reason."""
    if not native.available():
        pytest.skip(f"no native kernels: {native.why_missing()}")
    tested, before = request.config.stash[TESTED], native.kernel()
    try:
        native.set_kernel(request.param)
    except ValueError as error:
        tested.skipped[request.param] = str(error)
        pytest.skip(str(error))
    yield request.param
    tested.ran[request.param] += 1
    native.set_kernel(before)


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[TESTED] = TestedKernels.nothing_yet()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and leave out what is tested on another instruction set.

    An instruction set takes the code of some forms from another one, where their tests run. The module of a test says
    QUANTIZED = True if the values are int8, and FORM if the form is no parameter.
    """
    items[:] = longest_first(items)
    if native.available():
        items[:] = [item for item in items if not _runs_code_of_another(item)]


def _runs_code_of_another(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    module = getattr(item, "module", None)
    kernel, form = parameters.get("kernel"), parameters.get("form", getattr(module, "FORM", None))
    if kernel is None or form not in (*native.INT8_FORMS, native.PAIRMASK):
        return False
    return native.kernel_origin(kernel, form, quantized=getattr(module, "QUANTIZED", False)) != kernel


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[DESELECTED] = True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:  # one of several processes, pytest -n 2
        tested = session.config.stash[TESTED]
        output |= {"ran": dict(tested.ran), "skipped": tested.skipped, "deselected": DESELECTED in session.config.stash}
    elif exitstatus == pytest.ExitCode.OK and fault(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Add up what each of several processes has tested; one that died says nothing, and fails the run by itself."""
    output = getattr(node, "workeroutput", None)
    if output is not None:
        tested = node.config.stash[TESTED]
        tested.ran.update(output["ran"])
        tested.skipped.update(output["skipped"])
        if output["deselected"]:
            node.config.stash[DESELECTED] = True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    """Print the instruction sets last, after the summary of skips."""
    yield
    if config.option.collectonly or hasattr(config, "workeroutput"):
        return
    tested = config.stash[TESTED]
    for line in tested.lines():
        terminalreporter.write_line(line, yellow=bool(tested.why_missing), bold=True)
    if why := fault(config):
        terminalreporter.write_line(f"FAILED: {why}; python setup.py build_native builds it", red=True, bold=True)


def fault(config: pytest.Config) -> str:
    """Return the reason why a run fails though each of its tests passed, or ""."""
    if config.option.collectonly:
        return ""
    all_of_it = config.args_source is pytest.Config.ArgsSource.TESTPATHS and DESELECTED not in config.stash
    return config.stash[TESTED].fault(whole_suite=all_of_it)

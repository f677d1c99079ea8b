"""Threads: a forked child, callers side by side, and the lock of the interpreter."""

import os
import threading
import time

import pytest
import torch
from table import FORMS, packed_random_weight

from sparsify.kernels.cpu import library as native

SHAPE = (512, 512)


@pytest.mark.parametrize("form", FORMS)
def test_a_forked_child_computes(form):
    packed, x = packed_random_weight(form, SHAPE, 0.5, torch.float32), torch.randn(64, 512)
    expected = native.linear(form, x, *packed, None, SHAPE)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native.linear(form, x, *packed, None, SHAPE), expected) else 1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if done[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(done[1]) == 0


@pytest.mark.parametrize("form", FORMS)
def test_callers_side_by_side(form):
    """Several Python threads in the library at once, with different inputs, each get their own result."""
    packed = packed_random_weight(form, SHAPE, 0.8, torch.float32)
    inputs = [torch.randn(n, 512, generator=torch.Generator().manual_seed(n)) for n in (1, 7, 64, 130)]
    expected = [native.linear(form, x, *packed, None, SHAPE) for x in inputs]
    wrong = []

    def call(x, y):
        for _ in range(30):
            if not torch.equal(native.linear(form, x, *packed, None, SHAPE), y):
                wrong.append(len(x))

    callers = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_call_releases_the_interpreter_lock():
    packed = packed_random_weight("panel", (2048, 2048), 0.5, torch.float32)
    x = torch.randn(2048, 2048)
    began, ended = [], []

    def call():
        began.append(time.monotonic())
        native.linear("panel", x, *packed, None, (2048, 2048))
        ended.append(time.monotonic())

    caller, ticks = threading.Thread(target=call), []
    caller.start()
    while caller.is_alive():
        ticks.append(time.monotonic())
        time.sleep(0.0005)
    caller.join()
    assert sum(began[0] + 0.005 < t < ended[0] - 0.005 for t in ticks) > 3

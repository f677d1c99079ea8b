"""The teams that run a call's tasks: the same bits from each, one OpenMP runtime, forks, callers side by side."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, os, sys, threading, time
import torch
from sparsify.kernels.cpu import library as native, training
from sparsify.kernels.cpu.convolution import convolution
from sparsify.kernels.geometry import Geometry

def weight(form, dtype, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.3
    crow = torch.zeros(shape[0] + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    values = torch.randn(int(crow[-1]), generator=generator)
    values = (values * 30).clamp(-127, 127).to(torch.int8) if form in native.QUANTIZES_INPUTS else values.to(dtype)
    return native.pack(form, crow, mask.nonzero()[:, 1], values, shape)

def cases(tokens, shape=(150, 260)):
    scale = torch.linspace(0.01, 0.02, shape[0])
    for form in native.INT8_FORMS:
        for dtype in native.DTYPES:
            packed = weight(form, dtype, shape)
            for n in tokens:
                x = torch.randn(n, shape[1], generator=torch.Generator().manual_seed(n)).to(dtype)
                yield form, x, *packed, None, shape, 0, None, None, scale if form in native.QUANTIZES_INPUTS else None

CASES = {n: list(cases((n,))) for n in (1, 3, 40, 200)}

def outputs(tokens=(1, 3, 40, 200)):  # without torch's own threads, which no child of a fork has
    of = [native.linear(*case) for n in tokens for case in CASES[n]]
    return b"".join(y.view(torch.uint8).numpy().tobytes() for y in of)

def others():  # convolutions, images, gradients, masks
    make = torch.Generator().manual_seed(5)
    found = []
    for dtype in native.DTYPES:
        x, bias = torch.randn(2, 16, 19, 23, generator=make).to(dtype), torch.randn(40, generator=make).to(dtype)
        scale = torch.rand(40, generator=make)
        residual = torch.randn(2, 40, 10, 12, generator=make).to(dtype)
        geometry = Geometry((3, 3), (2, 2), (1, 1))
        packed = weight("panel", dtype, (40, 144))
        found.append(convolution(x, *packed, bias, 40, geometry, 1, scale=scale, residual=residual))
        found.append(native.pointwise(x, *weight("panel", dtype, (40, 16)), bias, (40, 16)))
    mask = torch.rand(150, 260, generator=make) < 0.3
    crow = torch.zeros(151, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    grad, x = torch.randn(70, 150, generator=make), torch.randn(70, 260, generator=make)
    found.append(torch.zeros(150, 260))
    training.weight_grad(grad, x, crow, mask.nonzero()[:, 1].int(), found[-1])
    found.append(torch.randn(400, 700, generator=make))
    training.clear_masked(found[-1], torch.rand(400, 700, generator=make) < 0.5)
    return b"".join(y.contiguous().view(torch.uint8).numpy().tobytes() for y in found)

def digest(values):
    return hashlib.sha256(values).hexdigest()

torch.set_num_threads(4)
"""


def run(code: str, team: str) -> subprocess.CompletedProcess[str]:
    """Run the program and `code` in a process with this team."""
    environment = {**os.environ, "SPARSIFY_THREADS": team, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def printed(code: str, team: str) -> list[str]:
    """Return the words that `code` prints."""
    done = run(code, team)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_each_team_gives_the_same_bits_with_torchs_openmp_as_the_only_one() -> None:
    code = """
mapped = {line.split()[-1] for line in open("/proc/self/maps")} if sys.platform == "linux" else set()
runtimes = [path for path in mapped if os.path.basename(path).startswith(("libgomp", "libomp", "libiomp"))]
print(native.team(), digest(outputs() + others()), len(runtimes))
"""
    found = {team: printed(code, team) for team in ("openmp", "pool", "serial")}
    assert [name for name, _, _ in found.values()] == list(found)
    assert len({digest for _, digest, _ in found.values()}) == 1
    assert {runtimes for _, _, runtimes in found.values()} == {"1"}


def test_an_unknown_team_is_an_error() -> None:
    done = run("outputs()", "threads")
    assert "ValueError: SPARSIFY_THREADS names no team of threads of the native kernels: openmp" in done.stderr
    done = run("native.team()", "threads")
    assert "ValueError: SPARSIFY_THREADS=threads: SPARSIFY_THREADS names no team" in done.stderr


@pytest.mark.parametrize("team", ["openmp", "pool", "serial"])
def test_forked_children_compute_side_by_side_and_end(team: str) -> None:
    """As the workers of a DataLoader, which inherit a library whose threads have not come along."""
    code = """
expected = outputs()
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(outputs() == expected for _ in range(3)) else 1)
    children.append(child)
assert outputs() == expected
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
    assert printed(code, team) == ["0", "0", "0"]


def test_callers_side_by_side_and_changing_numbers_of_threads_share_a_pool() -> None:
    code = """
expected = {n: outputs((n,)) for n in (1, 40)}
wrong = []
def call(n, threads):
    for _ in range(8):
        torch.set_num_threads(threads)
        if outputs((n,)) != expected[n]:
            wrong.append(n)
callers = [threading.Thread(target=call, args=(n, threads)) for n in (1, 40) for threads in (1, 2, 7)]
for caller in callers: caller.start()
for caller in callers: caller.join()
print(len(wrong), sum(1 for _ in os.listdir("/proc/self/task")) < 80)
"""
    assert printed(code, "pool") == ["0", "True"]


def test_torch_says_how_many_threads_of_the_pool_compute() -> None:
    code = """
def started():
    return len(os.listdir("/proc/self/task"))
form, x, *rest = CASES[200][0]
for threads in (1, 3, 2, 5, 1):
    torch.set_num_threads(threads)
    before = started()
    native.linear(form, x, *rest)
    print(started() - before)
"""
    assert printed(code, "pool") == ["0", "2", "0", "2", "0"]

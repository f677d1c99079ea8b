import ctypes
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from sparsify.kernels.cpu import memory
from sparsify.kernels.cpu.memory import empty

pytestmark = pytest.mark.skipif(not memory._PRIVATE, reason="this system has no private anonymous memory")

LARGE = (3, 64, 50, 41)  # 1.6 MB of float32


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(memory, "_free", [])


@pytest.mark.parametrize("size", [(2, 3, 5, 7), LARGE, (1, 64, 100, 41), (300, 1, 50, 41)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_tensor_is_as_torchs_own(size, dtype, layout):
    made, torchs = (
        empty(size, dtype, channels_last=layout is torch.channels_last),
        torch.empty(size, dtype=dtype, memory_format=layout),
    )
    assert made.shape == torchs.shape
    assert made.stride() == torchs.stride()
    assert made.dtype == dtype
    assert made.is_contiguous(memory_format=layout)
    assert made.storage_offset() == 0
    assert not made._is_view()
    values = torch.arange(made.numel()).view(size).to(dtype)
    assert torch.equal(made.copy_(values), values)


@pytest.mark.parametrize("size", [(0, 5), (1 << 18,), (1 << 18, 1), (2, 3, 1 << 16)])
def test_other_numbers_of_dimensions(size):
    assert empty(size, torch.float32).stride() == torch.empty(size).stride()


def test_memory_is_used_again_once_no_view_is_left():
    first = empty(LARGE, torch.float32)
    address, view, array = first.data_ptr(), first[1:, ::2], first.numpy()
    del first
    assert empty(LARGE, torch.float32).data_ptr() != address
    del view
    other = empty(LARGE, torch.float32)
    assert other.data_ptr() != address
    array[:] = 1
    del array
    assert empty(LARGE, torch.float32).data_ptr() == address


def test_the_smallest_block_with_room_is_taken_and_a_new_one_replaces_the_largest():
    sizes = [1 << 18, 1 << 20, 1 << 19]
    blocks = [empty((n,), torch.float32) for n in sizes]
    addresses = [block.data_ptr() for block in blocks]
    del blocks
    half = empty(((1 << 18) + 1,), torch.float32)
    assert half.data_ptr() == addresses[2]
    more = empty(((1 << 20) + 1,), torch.float32)
    assert [block.n_bytes for block in memory._free] == [4 << 18]
    assert more.numel() == (1 << 20) + 1


def test_of_equal_blocks_the_one_given_back_last_is_taken():
    blocks = [empty((1 << 18,), torch.float32) for _ in range(3)]
    addresses = [block.data_ptr() for block in blocks]
    for _ in range(3):
        del blocks[0]
    assert empty((1 << 18,), torch.float32).data_ptr() == addresses[2]


def test_in_inference_mode():
    with torch.inference_mode():
        tensor = empty(LARGE, torch.float32, channels_last=True).fill_(2.0)
        assert tensor.is_inference()
        assert bool((tensor[:, 1] + tensor[:, 0] == 4).all())
    assert bool((tensor.clone() == 2).all())


def test_no_more_is_kept_than_said(monkeypatch):
    monkeypatch.setattr(memory, "KEPT_BYTES", 3 << 20)
    blocks = [empty((1 << 18,), torch.float32) for _ in range(5)]
    del blocks
    assert [block.n_bytes for block in memory._free] == [1 << 20] * 3
    large = empty((1 << 20,), torch.float32)
    del large
    assert [block.n_bytes for block in memory._free] == [1 << 20] * 2


def test_memory_that_is_not_kept_is_gone_at_once(monkeypatch):
    monkeypatch.setattr(memory, "KEPT_BYTES", 1 << 20)
    taken, take = [], memory._take

    def noting(n_bytes):
        block = take(n_bytes)
        taken.append(weakref.ref(block))
        return block

    monkeypatch.setattr(memory, "_take", noting)
    gc.disable()
    try:
        tensor = empty((1 << 19,), torch.float32)
        del tensor
        assert [block() for block in taken] == [None]
    finally:
        gc.enable()


def test_an_output_may_be_changed_in_place_when_gradients_are_wanted_later():
    with torch.no_grad():
        features = empty((1 << 18,), torch.float32).zero_()
    weight = torch.ones(1 << 18, requires_grad=True)
    features += weight
    features.sum().backward()
    assert bool((weight.grad == 1).all())


def test_memory_of_threads_is_apart():
    wrong = []

    def fill(number):
        for _ in range(50):
            tensor = empty((1 << 18,), torch.float32).fill_(number)
            wrong.extend([number] * (not bool((tensor == number).all())))

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _overwrite(connection):
    ctypes.memset(empty((1 << 18,), torch.float32).data_ptr(), 2, 1 << 20)  # without torch's threads: a fork has none
    connection.send("done")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_memory_of_its_own():
    tensor = empty((1 << 18,), torch.float32).fill_(1.0)
    kept = empty((1 << 18,), torch.float32).fill_(1.0)
    address = kept.data_ptr()
    del kept
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_overwrite, args=(there,))
    process.start()
    assert here.recv() == "done"
    process.join()
    again = empty((1 << 18,), torch.float32)
    assert again.data_ptr() == address
    assert bool((again == 1).all())
    assert bool((tensor == 1).all())


def test_tensors_that_live_until_the_end_are_no_trouble():
    program = (
        "import torch\n"
        "from sparsify.kernels.cpu.memory import empty\n"
        "kept = empty((1 << 20,), torch.float32).fill_(1)\n"
        "torch.kept = [empty((1 << 20,), torch.float32), kept[5:]]\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""Tensors beyond the budget lie in a file, and come back bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.calibration.activation_store import MemoryBudget, SpillingTensorList


@pytest.mark.parametrize(("n_bytes", "n_on_disk"), [(None, 0), (0, 3), (100, 1), (10**6, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_what_is_put_in_comes_out(n_bytes: int | None, n_on_disk: int, dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, n).to(dtype).T for n in (1, 5, 8)]
    budget = None if n_bytes is None else MemoryBudget(n_bytes * dtype.itemsize // 4)
    with SpillingTensorList(3, budget) as stored:
        for _ in range(2):  # put in again, it takes the place of what was there
            for i, tensor in enumerate(tensors):
                stored[i] = tensor
        assert all(torch.equal(stored[i], tensor) and stored[i].dtype == dtype for i, tensor in enumerate(tensors))
        assert stored.n_on_disk == n_on_disk
        assert budget is None or budget.left >= 0


def test_what_is_put_in_again_takes_the_place_of_what_was_there() -> None:
    with SpillingTensorList(2, MemoryBudget(0)) as stored:
        for n in (4, 2, 3, 5, 5):
            stored[0], stored[1] = torch.full((n,), float(n)), torch.full((n,), -float(n))
            assert (stored[0].tolist(), stored[1].tolist()) == ([n] * n, [-n] * n)
        assert stored._n_filed == 4 * 2 * (4 + 5)  # bytes, at the first size and the one it did not have room for


def test_nothing_stays_behind_even_where_the_process_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, signal, torch; from sparsify.calibration.activation_store import MemoryBudget, SpillingTensorList; "
        "stored = SpillingTensorList(1, MemoryBudget(0)); "
        "stored[0] = torch.ones(4); assert stored.n_on_disk == 1; os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(sparsify.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())
    with SpillingTensorList(1, MemoryBudget(0)) as stored:
        stored[0] = torch.ones(4)
    with pytest.raises(IndexError, match="nothing was put at 0"):
        stored[0]


def test_lists_share_a_budget() -> None:
    budget = MemoryBudget(20)
    with SpillingTensorList(2, budget) as one, SpillingTensorList(2, budget) as two:
        one[0], two[0], one[1] = torch.ones(3), torch.ones(2), torch.ones(2)
        assert (one.n_on_disk, two.n_on_disk, budget.left) == (1, 0, 0)
        one[0] = torch.ones(1)  # 8 bytes less
        two[1] = torch.ones(2)
        assert (one.n_on_disk, two.n_on_disk, budget.left) == (1, 0, 0)
        two.close()
        assert budget.left == 16
    assert budget.left == 20
    with pytest.raises(ValueError, match="a budget is a number of bytes, got -1"):
        MemoryBudget(-1)

"""Tensors that do not fit the budget lie in files, and come back bit for bit."""

import pytest
import torch

from sparsify.shelf import Budget, Shelf


@pytest.mark.parametrize("budget", [None, 0, 100, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_what_is_put_in_comes_out(budget: int | None, dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, n).to(dtype).T for n in (1, 5, 8)]
    with Shelf(3, None if budget is None else Budget(budget)) as shelf:
        for _ in range(2):  # put in again, it takes the place of what was there
            for i, tensor in enumerate(tensors):
                shelf[i] = tensor
        assert all(torch.equal(shelf[i], tensor) and shelf[i].dtype == dtype for i, tensor in enumerate(tensors))
        sizes = [tensor.nbytes for tensor in tensors]
        if budget is not None:
            in_memory = sum(sizes) - sum(sizes[i] for i in range(3) if shelf._places[i] is not tensors[i])
            assert in_memory <= budget
        assert shelf.n_on_disk == (0 if budget is None or budget > 1000 else 3 if budget == 0 else shelf.n_on_disk)


def test_nothing_stays_behind() -> None:
    with Shelf(1, Budget(0)) as shelf:
        shelf[0] = torch.ones(4)
        assert shelf._folder is not None
        path = shelf._folder.name
    with pytest.raises(IndexError, match="nothing was put at 0"):
        shelf[0]
    from pathlib import Path

    assert not Path(path).exists()


def test_shelves_share_a_budget() -> None:
    budget = Budget(20)
    with Shelf(2, budget) as one, Shelf(2, budget) as two:
        one[0], two[0], one[1] = torch.ones(3), torch.ones(2), torch.ones(2)
        assert (one.n_on_disk, two.n_on_disk, budget.left) == (1, 0, 0)
        one[0] = torch.ones(1)  # 8 bytes less
        two[1] = torch.ones(2)
        assert (one.n_on_disk, two.n_on_disk, budget.left) == (1, 0, 0)
        two.close()
        assert budget.left == 16
    assert budget.left == 20
    with pytest.raises(ValueError, match="a budget is a number of bytes, got -1"):
        Budget(-1)

"""Two processes that share the calibration data make the masks of one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify.gram import Gram
from sparsify.ranks import add_up, own_share

if not torch.distributed.is_available():
    pytest.skip("torch has no torch.distributed here", allow_module_level=True)

PROGRAM = """
import sys, torch, sparsify
import torch.distributed as dist
from torch import nn
rank, folder = int(sys.argv[1]), sys.argv[2]
if rank >= 0:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(3)), nn.Linear(24, 8))
data = [torch.randn(40, 24) for _ in range(5)]
sparsify.prune(sparsify.convert(model), 0.5, method="sparsegpt", data=data)
torch.save(model.state_dict(), f"{folder}/{rank}.pt")
if rank >= 0:
    data[1][0, 0] = torch.nan
    try:
        sparsify.prune(model, 0.6, method="wanda", data=data)
    except ValueError as error:
        print(rank, error)
    dist.destroy_process_group()
"""


def test_two_ranks_give_the_masks_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True) for rank in (-1, 0, 1)
    ]
    printed = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    one, first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (-1, 0, 1))
    assert any(name.endswith("mask") for name in one)
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        if name.endswith("mask"):
            assert torch.equal(first[name], tensor), name
        else:
            torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-6)
    # An error in the data of one process ends both, which would otherwise wait for each other.
    assert "another process found its calibration data wrong" in printed[1]
    assert "holds NaN" in printed[2]


def test_without_a_group_all_is_as_it_was() -> None:
    gram = Gram(2)
    assert add_up(gram) is gram
    assert own_share([1, 2]) == [1, 2]
    with pytest.raises(ValueError, match="wrong"):
        add_up(None, ValueError("wrong"))


def test_the_error_names_layer_and_batch() -> None:
    model = sparsify.convert(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="0: its input in batch 1 of the calibration data holds NaN"):
        sparsify.prune(model, 0.5, method="wanda", data=[torch.ones(2, 4), torch.full((2, 4), torch.nan)])

"""Two processes that train one model, with DDP or FSDP2, get the masks and weights that one process gets."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import distributed
import pytest
import torch
import torch.distributed as dist
from cases import SHAPES, weight

from sparsify.distributed import Ranks
from sparsify.masking.patterns import choose_mask, keep_largest, parse_pattern

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every case on two ranks, in one start of torchrun."""
    out = tmp_path_factory.mktemp("runs")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", distributed.__file__, str(out)]
    done = subprocess.run([sys.executable, *command, "ddp", "fsdp"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", distributed.CASES)
def test_two_ranks_end_as_one_process(runs: Path, case: str, kind: str) -> None:
    """Masks are equal; weights differ by the order in which two halves of a batch are added.

    In float64 one such sum is off by at most a few eps = 2**-52 of its terms. Adam divides a gradient by its own size,
    so a step moves a weight by lr * (1 + O(1e3 eps)) where gradients are not below 1e-3 of their terms; over 12 steps
    whose errors feed each other that stays far below 1e-9 of weights of about 0.3.
    """
    ranks = [torch.load(runs / f"{kind}-{case}-{rank}.pt", weights_only=True) for rank in range(2)]
    alone = distributed.train(case, "alone", 0, 1)
    masked = 0
    for name, expected in alone.items():
        for got in ranks:
            if expected.dtype == torch.bool:
                masked += int((~expected).sum())
                assert torch.equal(got[name], expected), name
            else:
                torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(ranks[0][name], ranks[1][name])
    assert masked


def test_what_cannot_be_followed_is_refused_on_every_rank(runs: Path) -> None:
    said = [torch.load(runs / f"refusals-{rank}.pt", weights_only=True) for rank in range(2)]
    for name, message in (*said[0].items(), *said[1].items()):
        if name.endswith("summoned"):
            assert float(message) == 0.5
        elif name.startswith("FSDP1"):
            assert "FSDP1 (FullyShardedDataParallel) has cut its weight into flat pieces" in message, name
            assert "fully_shard" in message
        else:
            assert message, name
    assert len(said[0]) == 13


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("n", [2, 3])
def test_ranks_that_rank_rows_choose_what_one_would(shape: tuple[int, int], sparsity: float, n: int) -> None:
    """Threads stand for processes; many scores are equal, so that ties cross from rank to rank."""
    scores = [weight(shape, seed=1).round(), weight((shape[1], shape[0]), seed=2).round()]
    n_keep = sum(s.numel() for s in scores) - round(sparsity * sum(s.numel() for s in scores))
    expected = keep_largest(scores, n_keep)
    barrier, said = Barrier(n), {}

    class Thread(Ranks):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            said[self.rank] = tensor
            barrier.wait()
            total = torch.stack([said[rank] for rank in range(n)]).sum(0).to(tensor.dtype)
            barrier.wait()
            return total

    def one(rank: int) -> list[torch.Tensor]:
        ranks = Thread(n, rank)
        rows = keep_largest([ranks.rows(s) for s in scores], n_keep, ranks)
        mask = choose_mask(
            ranks.rows(scores[0]),
            ranks.rows(expected[0]),
            parse_pattern("unstructured"),
            shape[0] * shape[1] // 2,
            ranks=ranks,
        )
        return [ranks.join(r, s.shape[0]) for r, s in zip(rows, scores, strict=True)] + [ranks.join(mask, shape[0])]

    with ThreadPoolExecutor(n) as pool:
        for *got, chosen in pool.map(one, range(n)):
            assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
            whole = choose_mask(scores[0], expected[0], parse_pattern("unstructured"), shape[0] * shape[1] // 2)
            assert torch.equal(chosen, whole)

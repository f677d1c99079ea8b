"""One training by one process or by two, with DDP or FSDP2; started by test_distributed.py with torchrun.

Prints nothing; leaves masks and weights, whole, in OUT/<kind>-<case>-<rank>.pt.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import sparsify
from sparsify.layers import fsdp as sharded
from sparsify.layers import masked

N_STEPS, BATCH = 12, 16
SPAN = {"kind": "linear", "end": 9, "every": 3}
CASES = {
    "global": {"sparsity": 0.8, "allocation": "global", "schedule": SPAN},
    "layer": {"sparsity": 0.9, "schedule": SPAN},
    "rigl": {
        "sparsity": 0.8,
        "allocation": "erk",
        "regrow": {"by": "gradient"},
        "schedule": {"kind": "constant", "end": 9, "every": 3},
    },
    "movement": {"sparsity": 0.7, "method": "movement", "masked": "frozen", "allocation": "global", "schedule": SPAN},
    "snip": {"sparsity": 0.8, "method": "snip", "allocation": "global"},
    "grasp": {"sparsity": 0.6, "method": "grasp", "allocation": "global"},
    "columns": {"sparsity": 0.5, "pattern": "columns", "schedule": SPAN},
    "straight-through": {
        "sparsity": 0.8,
        "masked": "trained",
        "decay": 0.1,
        "schedule": {"kind": "constant", "end": 9, "every": 1},
    },
}


def refuse(tensor: torch.Tensor) -> torch.Tensor:
    """Stand for `whole` where no rank may gather a weight."""
    assert not hasattr(tensor, "full_tensor"), "a sharded weight was gathered"
    return tensor


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 12, generator=generator, dtype=torch.float64), torch.randint(
        5, (BATCH,), generator=generator
    )


def train(case: str, kind: str, rank: int, n_ranks: int) -> dict[str, torch.Tensor]:
    """Train at one global batch, each rank on its half, in float64."""
    torch.manual_seed(0)
    model = sparsify.convert(nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 9), nn.Tanh(), nn.Linear(9, 5)))
    model.double()
    whole: nn.Module = model
    if kind == "ddp":
        whole = nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.01, weight_decay=0.1)
    if kind == "fsdp" and case != "columns":  # whose units lie across all ranks
        masked.whole = refuse

    def loss(step: int = 0) -> torch.Tensor:
        x, y = data(step)
        mine = slice(rank * BATCH // n_ranks, (rank + 1) * BATCH // n_ranks)
        return F.cross_entropy(whole(x[mine]), y[mine])

    looks = loss if CASES[case].get("method") in ("snip", "grasp") else None
    pruner = sparsify.Pruner(whole, sparsify.Recipe(groups=[CASES[case]]), optimizer=optimizer, loss=looks)
    for step in range(N_STEPS):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        pruner.step()
    pruner.finish()
    masked.whole = sharded.whole
    ended = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        ended[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return {name: tensor.detach().clone() for name, tensor in ended.items()}


def refusals(rank: int) -> dict[str, str]:
    """Return the errors of what cannot be followed on several ranks; every rank gets one, or the others would wait."""

    def said(act) -> str:
        try:
            act()
        except ValueError as error:
            return str(error)
        return ""

    found = {}
    recipe = sparsify.Recipe(groups=[{"sparsity": 0.5}])
    for original in (True, False):
        model = sparsify.convert(nn.Sequential(nn.Linear(12, 17), nn.Linear(17, 5)))
        cut = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
        for verb in (sparsify.prune, sparsify.export, sparsify.convert):
            found[f"FSDP1 {original} {verb.__name__}"] = said(lambda verb=verb, cut=cut: verb(cut))
        for verb in (sparsify.apply, sparsify.Pruner):
            found[f"FSDP1 {original} {verb.__name__}"] = said(lambda verb=verb, cut=cut: verb(cut, recipe))
        with FullyShardedDataParallel.summon_full_params(cut):
            sparsify.prune(cut, 0.5)
        found[f"FSDP1 {original} summoned"] = str(model[0].sparsity)
    model = sparsify.convert(nn.Sequential(nn.Linear(12, 17), nn.Linear(17, 5)))
    whole = nn.parallel.DistributedDataParallel(model)
    if rank == 1:
        with torch.no_grad():
            model[1].weight[-1, 0] = torch.nan
    found["NaN on one rank"] = said(lambda: sparsify.Pruner(whole, recipe))
    return found


def main(out: Path, kinds: list[str]) -> None:
    dist.init_process_group("gloo")
    for kind in kinds:
        for case in CASES:
            ended = train(case, kind, dist.get_rank(), dist.get_world_size())
            torch.save(ended, out / f"{kind}-{case}-{dist.get_rank()}.pt")
    torch.save(refusals(dist.get_rank()), out / f"refusals-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of torch may outlive the objects that own them, and then abort a process that is done


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])

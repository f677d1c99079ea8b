"""Thread teams: layers on OpenMP's threads and on the library's own, each in a process of its own, in turns.

A process has one team, chosen by SPARSIFY_THREADS.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

import sparsify
from benchmarks import weights
from benchmarks.cases import Grid
from benchmarks.load import row_of_calls, start_busy_process
from benchmarks.processes import Process, answer_all, seconds_of_calls
from sparsify.kernels.cpu import library as native

TEAMS = ("openmp", "pool")
#: Single calls of a round, so many or for so long, whichever is less; each round visits the teams in turns.
CALLS_OF_ROUND, LONGEST_S = 200, 0.3
FORM = "panel"


def run(grid: Grid) -> Iterator[dict[str, Any]]:
    """Yield a row for each layer and team, alone and beside a busy process; `p99_us` is over single calls."""
    cells = [(shape, tokens, s) for shape in grid.shapes for tokens in grid.tokens for s in grid.sparsities]
    processes = {team: _process(team) for team in TEAMS}
    try:
        for shape, tokens, sparsity in tqdm(cells, desc="teams"):
            for process in processes.values():
                process.ask({"shape": shape, "tokens": tokens, "sparsity": sparsity})
            for busy in (False, True):
                other = start_busy_process() if busy else None
                try:
                    times_s = _in_turns(processes, grid.rounds)
                finally:
                    if other:
                        other.terminate()
                        other.communicate()
                for team, seconds in times_s.items():
                    yield row_of_calls(team, seconds, shape=list(shape), tokens=tokens, sparsity=sparsity, busy=busy)
    finally:
        for process in processes.values():
            process.end()


def _process(team: str) -> Process:
    threads = str(torch.get_num_threads())
    made = Process("from benchmarks import teams; teams.answer()", threads, environment={"SPARSIFY_THREADS": team})
    if (found := made.ask({})) != team:
        made.end()
        raise RuntimeError(f"a process was asked for the team {team!r} and has {found!r}")
    return made


def _in_turns(processes: dict[str, Process], rounds: int) -> dict[str, list[float]]:
    """Return the sorted seconds of the calls of each team."""
    times_s: dict[str, list[float]] = {team: [] for team in processes}
    for number in range(rounds):
        for team in TEAMS if number % 2 else reversed(TEAMS):
            times_s[team] += processes[team].ask({"calls": CALLS_OF_ROUND})
    return {team: sorted(seconds) for team, seconds in times_s.items()}


@torch.inference_mode()
def answer() -> None:
    """Answer questions as one of the processes: be a layer, or call it."""
    torch.set_num_threads(int(sys.argv[1]))
    layer, x = torch.nn.Module(), torch.empty(0)

    def reply(question: dict[str, Any]) -> Any:
        nonlocal layer, x
        if "calls" in question:
            return seconds_of_calls(lambda: layer(x), question["calls"], LONGEST_S)
        if "shape" in question:
            shape = question["shape"][0], question["shape"][1]
            layer = sparsify.export(weights.pruned_layer(shape, question["sparsity"]), format=FORM)
            x = weights.inputs(shape, question["tokens"])
        return native.team()

    answer_all(reply)

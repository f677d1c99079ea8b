"""Processes measured in turns: each holds what it measures, and answers a line of JSON by another."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SCRIPTS = Path(__file__).resolve().parents[1]
#: The threads of a process that has answered fall asleep before another is asked.
PAUSE_S = 0.01


class Process:
    """A process that runs some Python, with scripts/ on its path, and answers questions on its stdin."""

    def __init__(self, code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(_SCRIPTS)!r})\n{code}", *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=os.environ | dict(environment or {})
        )

    def ask(self, question: Any) -> Any:
        """Return the answer to a question. Raises RuntimeError if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        time.sleep(PAUSE_S)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self.end()
            raise RuntimeError(f"a measured process ended with status {status}")
        return json.loads(line)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def answer_all(answer: Callable[[Any], Any]) -> None:
    """Answer questions until there are no more, as one of the processes."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def seconds_of_calls(call: Callable[[], Any], n_calls: int, longest_s: float) -> list[float]:
    """Return the seconds of each of some calls, after a few that are not counted."""
    for _ in range(20):
        call()
    times_s: list[float] = []
    start = end = time.perf_counter()
    while len(times_s) < n_calls and end - start < longest_s:
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
        times_s.append(end - begin)
    return times_s

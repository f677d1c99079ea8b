"""The order of the suite's files: with a process for each core, a long one at the end would leave all others idle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Files that take longest, in seconds of a core: those above 25 in a run with --durations.
LONGEST = (
    "scripts/test_zoo.py",
    "kernels/cpu/test_native_program.py",
    "deployment/test_aotinductor.py",
    "project/test_docs.py",
    "scripts/test_bench.py",
    "deployment/test_onnx_export.py",
    "scripts/test_minilm.py",
    "kernels/test_gpu.py",
    "kernels/cpu/test_team.py",
    "kernels/cpu/test_linear_int8.py",
    "integrations/test_on_import.py",
    "scripts/test_hide.py",
    "layers/test_recurrent.py",
    "checkpoint/test_memory_of_load.py",
    "integrations/test_pretrained.py",
)


def longest_first(items: Sequence[Any]) -> list[Any]:
    """Return test items with those of LONGEST before all others, which stay as they were."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    return sorted(items, key=lambda item: places.get(item.path, len(places)))

import sys
from pathlib import Path

import pytest

from sparsify.kernels import native

sys.path.insert(0, str(Path(__file__).parent))  # table.py

if not native.available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _best_kernel_afterwards():
    yield
    native.set_kernel("")

import sys
from pathlib import Path

import pytest

from sparsify.kernels.cpu import library as native

sys.path.insert(0, str(Path(__file__).parent))  # table.py


@pytest.fixture(autouse=True)
def _native_kernels():
    if not native.available():
        pytest.skip(f"no native kernels: {native.why_missing()}")

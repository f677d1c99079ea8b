"""What several test files use: the modules in scripts/ (`assets` and `minilm`, as in the demo), and one thread."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: small products are faster without a second."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)

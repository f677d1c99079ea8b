"""Names that docstring examples may use without importing them."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, nn=torch.nn, sparsify=sparsify, tmp_path=tmp_path)

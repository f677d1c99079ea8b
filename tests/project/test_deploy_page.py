"""The blocks of docs/deploy.md are run, each whose packages are installed."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

from sparsify.kernels.cpu import library

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"


@pytest.mark.skipif(not library.available(), reason=f"no native kernels: {library.why_missing()}")
def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They build on the first one, and share its names."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    n_run = 0
    for block in blocks:
        needed = set(re.findall(r"^import (\w+)", block, re.MULTILINE))
        needed |= {"onnx", "onnxscript"} if re.search("export_onnx|onnx.export", block) else set()
        if any(importlib.util.find_spec(package) is None for package in needed):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the converters
            exec(block, names)
        n_run += 1
    assert isinstance(names["x"], torch.Tensor)
    assert n_run >= 2

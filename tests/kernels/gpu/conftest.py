"""These tests run on a GPU, or under Triton's interpreter, in the process that test_gpu.py starts; else not at all."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # device.py, launches.py
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))  # table.py

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

"""These tests run on a GPU, or under Triton's interpreter, in the process that test_gpu.py starts; else not at all."""

import os

import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

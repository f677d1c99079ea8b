"""Tests for a GPU or for Triton's interpreter, in the process started by test_gpu.py; else they are not collected."""

import os

import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

#!/usr/bin/env python3
"""Compress a trained model from the command line: the same code and options as `sparsify compress`.

python scripts/compress.py --model torchvision:resnet50 --weights resnet50.pt --sparsity 0.8 --out resnet50.safetensors
"""

import sys

from sparsify.cli import main

if __name__ == "__main__":
    sys.exit(main(["compress", *sys.argv[1:]]))

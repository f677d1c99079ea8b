"""Small grey pictures as PNG, without a library for pictures."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor


def png(levels: Tensor) -> bytes:
    """Return a grey PNG of values 0 (black) to 1 (white), (height, width)."""
    height, width = levels.shape
    grey = (levels.clamp(0, 1) * 255).round().to(torch.uint8)
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), grey], dim=1)  # a 0 before each row: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.contiguous().numpy().tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, *zip(*parts, strict=True)))


def data_url(levels: Tensor) -> str:
    """Return a grey picture as an address that holds the picture itself."""
    return "data:image/png;base64," + base64.b64encode(png(levels)).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

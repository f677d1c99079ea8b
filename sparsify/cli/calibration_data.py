"""Calibration data for the command line: texts, pictures, or batches made by the user's own function."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.cli.user_code import blaming, iterate, load_function

SAMPLES, TOKENS, BATCH = 128, 256, 8
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TEXTS = (".txt", ".md", ".jsonl", ".csv", ".cor")

_DECODERS = ("JPEG", "PNG", "BMP", "WEBP")  # for files of any name: some of pillow's others start programs
_PIXELS = 2**24  # of any picture; of a larger one each byte of the file may stand for so many:
_PIXELS_PER_BYTE = 32

_IMAGE_SIZE, _CROP = 256, 224
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's models expect


def load_data(source: str, model: str, *, samples: int = SAMPLES, tokens: int = TOKENS) -> Iterable[Any]:
    """Make calibration batches for the model named `model` from `source`.

    source is one of:
        package.module:function: returns an iterable of batches.
        a file or folder of texts, for "hf:FOLDER" models: tokenizer.json of the folder cuts the texts into `samples`
            pieces of `tokens` tokens, without padding.
        a folder of pictures: `samples` of the sorted files, evenly spread, are scaled to 256, cropped to 224 and
            normalised as ImageNet's are.

    Warns if there are fewer than `samples`, and raises ValueError with the way out.
    """
    if samples < 1 or tokens < 1:
        raise ValueError(f"--samples and --sample-tokens must be positive, got {samples} and {tokens}")
    path = Path(source)
    if not path.exists():
        return _function_batches(source)
    files = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    texts = [file for file in files if file.suffix.lower() in TEXTS]
    images = [file for file in files if file.suffix.lower() in IMAGES]
    if images and not texts:
        return _picture_batches(_spread(images, samples, source))
    if texts and not images:
        return _text_batches(texts, source, model, samples, tokens)
    found = "both texts and pictures" if texts else "no text or picture"
    raise ValueError(f"--data {source}: {found}; give a file or folder of {', '.join(TEXTS)} or of {', '.join(IMAGES)}")


def _text_batches(files: list[Path], texts: str, model: str, samples: int, tokens: int) -> list[dict[str, Tensor]]:
    """Cut the texts, one after the other, into pieces of one length, evenly spread over them."""
    source, _, folder = model.partition(":")
    vocabulary = Path(folder) / "tokenizer.json"
    if source != "hf" or not vocabulary.is_file():
        raise ValueError(
            f"--data: texts need an hf:FOLDER model with a tokenizer.json, and {model!r} has none; "
            "give --data package.module:function, which returns batches"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("tokenizers is not installed: pip install 'sparsify-torch[hf]'") from None
    with blaming(str(vocabulary)):
        tokenizer = Tokenizer.from_file(str(vocabulary))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    ids: list[int] = []
    for file in files:
        with blaming(f"--data {file}"):
            ids += tokenizer.encode(file.read_text(encoding="utf-8", errors="replace")).ids
    pieces = [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
    if not pieces:
        raise ValueError(f"--data: the texts have {len(ids)} tokens, less than one sample of {tokens}")
    chosen = _spread(pieces, samples, texts)
    return [{"input_ids": torch.tensor(chosen[i : i + BATCH], device="cpu")} for i in range(0, len(chosen), BATCH)]


def _picture_batches(files: list[Path]) -> Iterator[Tensor]:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ValueError("pillow is not installed: pip install pillow") from None
    return (torch.stack([_read_picture(file) for file in files[i : i + BATCH]]) for i in range(0, len(files), BATCH))


def _read_picture(file: Path) -> Tensor:
    """Scale a picture, crop it and normalise it, (3, 224, 224)."""
    from PIL import Image

    mean, spread = (torch.tensor(part, device="cpu")[:, None, None] for part in (_MEAN, _SPREAD))
    with blaming(f"--data {file}"), Image.open(file, formats=_DECODERS) as opened:
        width, height = opened.size
        scale = _IMAGE_SIZE / min(width, height)
        wide, high = max(_CROP, round(width * scale)), max(_CROP, round(height * scale))
        most = max(_PIXELS, _PIXELS_PER_BYTE * file.stat().st_size)
        if width * height > most or wide * high > _PIXELS:  # a few bytes can stand for gigabytes
            raise ValueError(
                f"{width}x{height} pixels in {file.stat().st_size:,} bytes; that is no photograph, leave it out"
            )
        whole = opened if opened.mode == "RGB" else opened.convert("RGB")
        picture = whole.resize((wide, high))
    left, top = (wide - _CROP) // 2, (high - _CROP) // 2
    pixels = bytearray(picture.crop((left, top, left + _CROP, top + _CROP)).tobytes())
    values = torch.frombuffer(pixels, dtype=torch.uint8).reshape(_CROP, _CROP, 3)
    return (values.permute(2, 0, 1) / 255 - mean) / spread


def _function_batches(source: str) -> Iterator[Any]:
    label = f"--data {source}"
    way_out = (
        "there is no such file or folder, nor such a function: "
        "give a file or folder, or package.module:function, importable from here"
    )
    return iterate(load_function(source, label, way_out=way_out)(), label)


def _spread(items: list[Any], n: int, source: str) -> list[Any]:
    """Return n of the items, evenly spread, or all if there are no more."""
    if len(items) < n:
        warnings.warn(f"--data {source}: {len(items)} samples, and {n} were asked for (--samples)", stacklevel=3)
    return items if len(items) <= n else [items[i * len(items) // n] for i in range(n)]

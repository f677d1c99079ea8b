"""Calibration data for the command line: texts, pictures, or batches made by the user's own function."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.calibration.sources import mix_data
from sparsify.cli.printing import note
from sparsify.cli.processors import PictureProcessor, picture_processor, tokenizer_of
from sparsify.cli.user_code import blaming, iterate, load_function

SAMPLES, TOKENS, BATCH = 128, 256, 8
#: The source of a language model without any text.
GENERATED = "generated"
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TEXTS = (".txt", ".md", ".jsonl", ".csv", ".cor")

_DECODERS = ("JPEG", "PNG", "BMP", "WEBP")  # for files of any name: some of pillow's others start programs
_PIXELS = 2**24  # of any picture; of a larger one each byte of the file may stand for so many:
_PIXELS_PER_BYTE = 32


def load_sources(
    sources: Sequence[str], model: str, *, samples: int = SAMPLES, tokens: int = TOKENS, weights: str | None = None
) -> Iterable[Any]:
    """Make calibration batches from one source, or from several with as many samples of each; see `load_data`."""
    if len(sources) == 1:
        return load_data(sources[0], model, samples=samples, tokens=tokens, weights=weights)
    if len(set(sources)) < len(sources):
        raise ValueError("--data: the same source twice; name each once")
    if samples < len(sources):
        raise ValueError(f"--samples {samples}: less than one of each of {len(sources)} sources of --data")
    share = -(-samples // len(sources))
    read = {name: load_data(name, model, samples=share, tokens=tokens, weights=weights) for name in sources}
    return mix_data(read, samples)


def load_data(
    source: str, model: str, *, samples: int = SAMPLES, tokens: int = TOKENS, weights: str | None = None
) -> Iterable[Any]:
    """Make calibration batches for the model named `model`, with `weights`, from `source`.

    source is one of:
        package.module:function: returns an iterable of batches.
        a file or folder of texts, for "hf:FOLDER" models: the folder's own tokenizer cuts the texts into `samples`
            pieces of `tokens` tokens, without padding.
        a folder of pictures: `samples` of the sorted files, evenly spread, as the model's own processor prepares them.

    A note tells the tokenizer or processor. Warns if there are fewer than `samples`, and raises ValueError with the way
    out.
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
        return _picture_batches(_spread(images, samples, source), model, weights)
    if texts and not images:
        return _text_batches(texts, source, model, samples, tokens)
    found = "both texts and pictures" if texts else "no text or picture"
    raise ValueError(f"--data {source}: {found}; give a file or folder of {', '.join(TEXTS)} or of {', '.join(IMAGES)}")


def _text_batches(files: list[Path], texts: str, model: str, samples: int, tokens: int) -> list[dict[str, Tensor]]:
    """Cut the texts, one after the other, into pieces of one length, evenly spread over them."""
    source, _, folder = model.partition(":")
    found = tokenizer_of(Path(folder)) if source == "hf" else None
    if found is None:
        raise ValueError(
            f"--data: texts need an hf:FOLDER model with a tokenizer (tokenizer.json, or tokenizer_config.json and its "
            f"files), and {model!r} has none; give --data package.module:function, which returns batches"
        )
    encode, about = found
    note(f"--data {texts}: token ids by {about} of {model}")
    ids: list[int] = []
    for file in files:
        with blaming(f"--data {file}"):
            ids += encode(file.read_text(encoding="utf-8", errors="replace"))
    pieces = [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
    if not pieces:
        raise ValueError(f"--data: the texts have {len(ids)} tokens, less than one sample of {tokens}")
    chosen = _spread(pieces, samples, texts)
    return [{"input_ids": torch.tensor(chosen[i : i + BATCH], device="cpu")} for i in range(0, len(chosen), BATCH)]


def _picture_batches(files: list[Path], model: str, weights: str | None) -> Iterator[Any]:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ValueError("pillow is not installed: pip install pillow") from None
    processor = picture_processor(model, weights)
    note(f"--data: pictures {processor.about}")
    return (_picture_batch(files[i : i + BATCH], processor) for i in range(0, len(files), BATCH))


def _picture_batch(files: list[Path], processor: PictureProcessor) -> Any:
    pictures = [_read_picture(file, processor.edge) for file in files]
    with blaming(f"--data {files[0]} to {files[-1].name}, {processor.about}"):
        return processor.prepare(pictures)


def _read_picture(file: Path, edge: int) -> Any:
    """Open a picture as RGB; `edge` is the shorter side that it will be scaled to."""
    from PIL import Image

    with blaming(f"--data {file}"), Image.open(file, formats=_DECODERS) as opened:
        width, height = opened.size
        scale = edge / max(min(width, height), 1)
        most = max(_PIXELS, _PIXELS_PER_BYTE * file.stat().st_size)
        if width * height > most or round(width * scale) * round(height * scale) > _PIXELS:
            raise ValueError(  # a few bytes can stand for gigabytes
                f"{width}x{height} pixels in {file.stat().st_size:,} bytes; that is no photograph, leave it out"
            )
        return opened.convert("RGB")


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

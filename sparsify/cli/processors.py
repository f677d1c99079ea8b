"""The processor of a model on the command line: its own way from pictures to inputs, and from texts to token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.cli.models import default_weights, named_weights
from sparsify.cli.user_code import blaming

#: Of ImageNet's pictures as most models expect them: the shorter side after scaling, the side of the crop, and mean
#: and standard deviation of each colour.
_EDGE, _CROP = 256, 224
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PictureProcessor:
    """The way from pictures to a model's input.

    about: the way in a few words: "through ..." or "as ...".
    edge: pixels of the shorter side of a scaled picture, or more.
    prepare: from RGB pictures of pillow to a batch, a tensor or a dict of tensors by name.
    """

    about: str
    edge: int
    prepare: Callable[[Sequence[Any]], Any]


def picture_processor(model: str, weights: str | None = None) -> PictureProcessor:
    """Return the processor for the model of this name on the command line.

    That is the image processor in the folder of hf:FOLDER, the transforms of torchvision's weights (those of
    `--weights`, else the default ones), or the configuration of timm's default weights. Any other model gets pictures
    as ImageNet's are prepared.
    """
    source, _, name = model.partition(":")
    found = None
    if source == "hf":
        found = _transformers(Path(name))
    elif source == "torchvision":
        found = _torchvision(model, weights)
    elif source == "timm":
        found = _timm(name)
    return found or _imagenet(model)


def tokenizer_of(folder: Path) -> tuple[Callable[[str], list[int]], str] | None:
    """Return the function from a text to its token ids for the model in a folder, and a few words about it.

    None if the folder has no tokenizer. Nothing is cut, padded, or run from the folder.
    """
    file = folder / "tokenizer.json"
    if (folder / "tokenizer_config.json").is_file():
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError("transformers is not installed: pip install 'sparsify-torch[hf]'") from None
        with blaming(f"--data: the tokenizer of hf:{folder}"):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return lambda text: list(tokenizer(text, truncation=False, verbose=False)["input_ids"]), type(
            tokenizer
        ).__name__
    if not file.is_file():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("tokenizers is not installed: pip install 'sparsify-torch[hf]'") from None
    with blaming(str(file)):
        plain = Tokenizer.from_file(str(file))
        plain.no_truncation()
        plain.no_padding()
    return lambda text: list(plain.encode(text).ids), file.name


def _transformers(folder: Path) -> PictureProcessor | None:
    """Return the image processor in a folder, if it has one."""
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        from transformers import AutoImageProcessor
    except ImportError:
        raise ValueError("transformers is not installed: pip install 'sparsify-torch[hf]'") from None
    with blaming(f"--data: the image processor of hf:{folder}"):
        options = {"local_files_only": True, "trust_remote_code": False}
        processor = AutoImageProcessor.from_pretrained(folder, **options)  # type: ignore[no-untyped-call]

    def prepare(pictures: Sequence[Any]) -> dict[str, Tensor]:
        batch: Mapping[str, Any] = processor(images=list(pictures), return_tensors="pt")
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    size = dict(getattr(processor, "size", None) or {})
    edge = max((n for key, n in size.items() if key in ("shortest_edge", "height", "width")), default=_EDGE)
    return PictureProcessor(f"through {type(processor).__name__} of hf:{folder}", max(edge, _EDGE), prepare)


def _torchvision(model: str, weights: str | None) -> PictureProcessor | None:
    """Return the transforms of a model's weights in torchvision, if it knows any."""
    named = (weights and named_weights(model, weights)) or default_weights(model)
    if named is None:
        return None
    transform = named.transforms()
    edge = getattr(transform, "resize_size", None) or [_EDGE]
    about = f"through the transforms of torchvision's {type(named).__name__}.{named.name}"
    return PictureProcessor(about, max(edge), _one_by_one(transform))


def _timm(name: str) -> PictureProcessor | None:
    """Return the transform of a model's default weights in timm, if there are any."""
    try:
        from timm.data import create_transform, resolve_data_config
        from timm.models import get_pretrained_cfg
    except ImportError:
        raise ValueError("timm is not installed: pip install 'sparsify-torch[vision]'") from None
    known = get_pretrained_cfg(name)
    if known is None:
        return None
    config = resolve_data_config(pretrained_cfg=known.to_dict())
    edge = int(max(config["input_size"][1:]) / config["crop_pct"]) + 1
    return PictureProcessor(f"through timm's configuration of {name}", edge, _one_by_one(create_transform(**config)))


def _imagenet(model: str) -> PictureProcessor:
    """Return the processor for a model with none of its own."""
    numbers = f"scaled to {_EDGE}, cropped to {_CROP}, less a mean of {_MEAN}, over {_SPREAD}"
    about = f"as ImageNet's, since no processor is known for {model}: {numbers}"
    return PictureProcessor(about, _EDGE, _one_by_one(_crop))


def _crop(picture: Any) -> Tensor:
    """Scale a picture, crop it and normalise it, (3, 224, 224)."""
    mean, spread = (torch.tensor(part, device="cpu")[:, None, None] for part in (_MEAN, _SPREAD))
    scale = _EDGE / min(picture.size)
    wide, high = (max(_CROP, round(n * scale)) for n in picture.size)
    left, top = (wide - _CROP) // 2, (high - _CROP) // 2
    cropped = picture.resize((wide, high)).crop((left, top, left + _CROP, top + _CROP))
    values = torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8).reshape(_CROP, _CROP, 3)
    return (values.permute(2, 0, 1) / 255 - mean) / spread


def _one_by_one(transform: Callable[[Any], Tensor]) -> Callable[[Sequence[Any]], Tensor]:
    return lambda pictures: torch.stack([transform(picture) for picture in pictures])

"""save_pretrained and from_pretrained: folders of any library that is known, without knowing the class."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.checkpoint.folder import kind_of
from sparsify.checkpoint.save_load import load, save
from sparsify.outputs import new_file
from sparsify.recipes.loading import recipe_text
from sparsify.recipes.schema import Recipe
from sparsify.reporting.model_card import CardFacts, write_card

#: A name on the Hub.
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")

#: Arguments of timm.create_model that read files or the network.
_FOR_TIMM = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "model_name"}


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    recipe: Recipe | str | None = None,
    quality: Mapping[str, Any] | None = None,
    speed: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Save a masked or exported model of transformers, sentence-transformers, diffusers or timm, with a model card.

    The folder is the one of the library's own save_pretrained, and loads with its own from_pretrained once this
    library is imported.

    base_model: the dense model's name on the Hub, for the card (default: the one that transformers remembers).
    recipe: the way of pruning, for the card.
    quality, speed: figures of yours for the card, by name: {"Lee correlation": 0.641}.
    options: as for the library's save_pretrained, such as max_shard_size.

    Raises ValueError for a model without layers of ours, or of another library (`save` writes any model).
    """
    if kind_of(model) is None:
        raise ValueError(
            "the model has no sparse layers: convert and prune it, and export it to run; a dense model has its own "
            "save_pretrained"
        )
    library = _library_of(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if library == "timm":
        _save_timm(model, Path(folder), options)
    else:
        owner: Any = model
        owner.save_pretrained(os.fspath(folder), **options)
    text = recipe_text(recipe) if isinstance(recipe, Recipe) else recipe
    facts = facts_of(model, base_model=base_model, recipe=text, quality=quality or {}, speed=speed or {})
    write_card(folder, model, facts, over=() if base_model is None else ("base_model",))


def from_pretrained(folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load the model in a folder, or of a name on the Hub, by the library and the class that the folder names.

    The class is one of the library's own, and no code of the folder runs. A folder of sentence-transformers gives a
    SentenceTransformer; one of transformers the class in `architectures`.

    options: as for the library's from_pretrained, such as dtype and device_map.

    Raises ValueError for a folder of an unknown library, and CheckpointError for files that were altered.
    """
    path = Path(folder)
    if not path.is_dir() and _ON_HUB.fullmatch(os.fspath(folder)):
        from huggingface_hub import snapshot_download

        path = Path(
            snapshot_download(os.fspath(folder), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
        )
    if (path / "modules.json").is_file():
        _check_modules(path / "modules.json")
        return _imported("sentence_transformers").SentenceTransformer(os.fspath(path), **options)  # type: ignore[no-any-return]
    if not (path / "config.json").is_file():
        raise ValueError(f"{folder}: there is no config.json or modules.json in this folder")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: config.json holds no object")
    if "_class_name" in config:
        kind = _class_of("diffusers", config["_class_name"], "diffusers.models.modeling_utils", "ModelMixin")
        return kind.from_pretrained(path, **options)  # type: ignore[no-any-return]
    if "architecture" in config:
        return _load_timm(path, config, options)
    names = config.get("architectures") or [None]
    kind = _class_of("transformers", names[0], "transformers.modeling_utils", "PreTrainedModel")
    return kind.from_pretrained(path, **{"trust_remote_code": False, **options})  # type: ignore[no-any-return]


def facts_of(model: nn.Module, **given: Any) -> CardFacts:
    """Return the facts for the card of a model of a known library."""
    library, kind = _library_of(model), type(model).__name__
    snippet = 'import sparsify\n\nmodel = sparsify.from_pretrained("FOLDER")  # or the name on the Hub'
    if library in ("transformers", "diffusers", "sentence_transformers"):
        call = f'{kind}("FOLDER")' if library == "sentence_transformers" else f'{kind}.from_pretrained("FOLDER")'
        snippet = f"import sparsify  # pip install sparsify-torch\nfrom {library} import {kind}\n\nmodel = {call}"
    base: Any = given.pop("base_model", None)
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if base is None and isinstance(name, str) and _ON_HUB.fullmatch(name) and not os.path.exists(name):
        base = name
    hub_name = {"sentence_transformers": "sentence-transformers"}.get(library, library)
    return CardFacts(hub_name, snippet, base_model=base, **given)


def _library_of(model: nn.Module) -> str:
    """Return the library of a model. Raises ValueError for none that is known."""
    for name, module, base in (
        ("sentence_transformers", "sentence_transformers", "SentenceTransformer"),
        ("transformers", "transformers.modeling_utils", "PreTrainedModel"),
        ("diffusers", "diffusers.models.modeling_utils", "ModelMixin"),
    ):
        if module in sys.modules and isinstance(model, getattr(sys.modules[module], base)):
            return name
    if isinstance(getattr(model, "pretrained_cfg", None), dict) and "timm" in sys.modules:
        return "timm"
    raise ValueError(
        f"{type(model).__name__} is no model of transformers, sentence-transformers, diffusers or timm; "
        "write it with sparsify.save(model, path), and load it onto a model that you build"
    )


def _class_of(library: str, name: Any, module: str, base: str) -> Any:
    """Return a model class of a library by the name in a folder, and nothing else of that name."""
    kind = getattr(_imported(library), name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, getattr(importlib.import_module(module), base)):
        raise ValueError(f"config.json names {name!r}, which is no model class of {library}")
    return kind


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        package = library.replace("_", "-")
        raise ValueError(f"the folder is one of {package}, which is not installed: pip install {package}") from None


def _check_modules(file: Path) -> None:
    """Raise ValueError unless the modules of a folder are those of sentence-transformers itself."""
    modules = json.loads(file.read_text(encoding="utf-8"))
    for module in modules if isinstance(modules, list) else [None]:
        kind = module.get("type") if isinstance(module, dict) else None
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            raise ValueError(f"{file}: {kind!r} is no module of sentence-transformers, and no other code is run")


def _save_timm(model: Any, folder: Path, options: Mapping[str, Any]) -> None:
    """Write timm's own config.json, and a checkpoint; `model_args` in options are those of create_model."""
    unknown = sorted(options.keys() - {"model_args"})
    if unknown:
        raise ValueError(f"{unknown[0]}: no option for models of timm; they take model_args, those of create_model")
    config = {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": model.num_classes,
        "model_args": dict(options.get("model_args") or {}),
    }
    save(model, folder / "model.safetensors")
    with new_file(folder / "config.json", "cannot write ") as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def _load_timm(folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    args = config.get("model_args") or {}
    if not isinstance(args, dict) or not _FOR_TIMM.isdisjoint(args) or not all(map(_is_plain, args.values())):
        raise ValueError(
            f"{folder}: model_args in config.json must be plain arguments of the model's shape, got {args}"
        )
    model: nn.Module = _imported("timm").create_model(
        str(config["architecture"]).partition(":")[0],
        pretrained=False,
        **{"num_classes": int(config["num_classes"]), **args, **options},
    )
    return load(folder / "model.safetensors", model).eval()


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, type(None))) or (
        isinstance(value, list) and all(map(_is_plain, value))
    )

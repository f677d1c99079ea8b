"""Models by name, for the command line: torchvision:vit_b_16, hf:FOLDER, package.module:builder."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsify.offload.disk_offload import without_memory


def build_model(spec: str) -> nn.Module:
    """Build the model that a name stands for, in eval mode.

    "torchvision:NAME" has random weights, "hf:FOLDER" loads the weights in a folder written by save_pretrained
    (nothing is downloaded), "package.module:builder" calls a function of no arguments. Raises ValueError with the way
    out.
    """
    source, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"model {spec!r}: write torchvision:NAME, hf:FOLDER or package.module:builder")
    if source == "torchvision":
        return _torchvision(name).eval()
    if source == "hf":
        return _transformers(name).eval()
    with importable_from_here():
        try:
            builder = getattr(importlib.import_module(source), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"model {spec!r}: {error}; the module must be importable from here") from error
        model = builder()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec!r}: {name}() returned a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


@contextlib.contextmanager
def importable_from_here() -> Iterator[None]:
    """Find modules in the present folder too: python -m does so, but an installed command does not."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a dense state_dict from .safetensors, or from .pt/.pth/.bin opened with weights_only, so that it runs no
    code.

    Raises ValueError if the file is neither, or is not for this model.
    """
    try:
        state = _read_state(Path(path))
        found = model.load_state_dict(state, strict=False)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from None
    tied = {name for name in found.missing_keys if name not in _own_tensors(model, set(state))}
    missing = [name for name in found.missing_keys if name not in tied]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"{path}: not for this model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(found.unexpected_keys)} are too many {found.unexpected_keys[:3]}"
        )


def _own_tensors(model: nn.Module, given: set[str]) -> set[str]:
    """Return the state names that no given name stands for already, through tying."""
    state = model.state_dict(keep_vars=True)
    covered = {id(state[name]) for name in given if name in state}
    return {name for name, tensor in state.items() if id(tensor) not in covered}


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError(f"{path}: not a state_dict; save model.state_dict(), not the model")
        return state
    raise ValueError(f"{path}: weights are read from .safetensors, .pt, .pth or .bin")


def _torchvision(name: str) -> nn.Module:
    try:
        from torchvision.models import get_model, list_models
    except ImportError:
        raise ValueError("torchvision is not installed: pip install 'sparsify-torch[vision]'") from None
    if name not in list_models():
        from sparsify.recipes.yaml_file import nearest

        raise ValueError(f"torchvision has no model {name!r}{nearest(name, list_models())}")
    model: nn.Module = get_model(name, weights=None)
    return model


def build_empty(spec: str) -> tuple[nn.Module, Path | None]:
    """Build a model without memory for its weights, and say where those of an hf:FOLDER lie; names as `build_model`."""
    source, _, name = spec.partition(":")
    with without_memory():
        if source != "hf":
            return build_model(spec), None
        config, kind = _hf_kind(name)
        model: nn.Module = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    return model.eval(), Path(name)


def _transformers(folder: str) -> nn.Module:
    _, kind = _hf_kind(folder)
    model: nn.Module = kind.from_pretrained(folder, local_files_only=True)
    return model


def _hf_kind(folder: str) -> tuple[Any, Any]:
    """Return the configuration in a folder, and the class of its model."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"hf:{folder}: there is no config.json in this folder; nothing is downloaded")
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise ValueError("transformers is not installed: pip install 'sparsify-torch[hf]'") from None
    import transformers

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    architectures = config.architectures or []
    kind = next((getattr(transformers, name) for name in architectures if hasattr(transformers, name)), AutoModel)
    return config, kind

"""What a run has finished, on disk, layer by layer, so that an interrupted one can go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from sparsify.calibration.data_parallel import is_first, wait_for_all
from sparsify.checkpoint.container import LayerEntry
from sparsify.checkpoint.save_load import read_layer, save
from sparsify.checkpoint.weight_codec import unpack_layer
from sparsify.layers import Masked
from sparsify.pruning.oneshot import Fit

_ABOUT = "run.json"


def fingerprint(batches: Iterable[Any]) -> str:
    """Return a SHA-256 over all tensors in calibration data.

    >>> fingerprint([torch.ones(2)]) == fingerprint([(torch.ones(2), "label")])
    True
    """
    digest = hashlib.sha256()
    for leaf in tree_flatten(list(batches))[0]:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)} ".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Journal:
    """A folder with one checkpoint for each finished layer, and a note of what the run was to do.

    `about` is that note: whatever decides the result, as text by name. Raises ValueError, naming what differs, for a
    folder that another run began.

    Under torchrun the processes share a folder, which must be one that all of them see; the first one writes.
    """

    def __init__(self, folder: str | os.PathLike[str], about: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        note = self.folder / _ABOUT
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not note.exists():
                if any(self.folder.iterdir()):
                    raise ValueError(f"{self.folder}: a folder with other files in it; a run starts in an empty one")
                temporary = note.with_suffix(".tmp")
                temporary.write_text(json.dumps(dict(about), indent=1))
                temporary.replace(note)
        wait_for_all()
        if not note.exists():
            raise ValueError(f"{self.folder}: not seen by this process; give a folder that all processes see")
        begun = json.loads(note.read_text())
        if odd := [key for key in {**about, **begun} if begun.get(key) != about.get(key)]:
            raise ValueError(
                f"{self.folder}: begun by a run with another {odd[0]} ({begun.get(odd[0])}, now {about.get(odd[0])}); "
                "give the same, or delete the folder to start anew"
            )

    def __contains__(self, name: str) -> bool:
        return self._file(name).exists()

    def write(self, name: str, layer: Masked) -> None:
        """Keep a finished layer. A crash leaves all of it, or nothing."""
        if is_first():
            if isinstance(fit := layer.__dict__.get("fit"), Fit):
                self._notes(name).write_text(json.dumps({"error": fit.error, "time_s": fit.time_s}))
            save(layer, self._file(name))
        wait_for_all()  # whoever reads the layer next finds it

    def read(self, name: str) -> tuple[LayerEntry, dict[str, Tensor]]:
        """Return a finished layer as `checkpoint.save` packed it; the names of its tensors begin below the layer."""
        return read_layer(self._file(name))

    def fetch(self, module: nn.Module) -> None:
        """Do nothing: the model is in memory (see `resident` for one that is not)."""

    def restore(self, name: str, layer: Masked) -> None:
        """Give a layer of a model in memory what it was when it was finished."""
        weight, mask = unpack_layer(*self.read(name))
        with torch.no_grad():
            layer.matrix(layer.weight.detach()).copy_(weight)
        layer.set_mask(mask)
        layer.__dict__["fit"] = self.fit(name)

    def fit(self, name: str) -> Fit | None:
        """Return how a finished layer came out."""
        notes = self._notes(name)
        return Fit(**json.loads(notes.read_text())) if notes.exists() else None

    def delete(self) -> None:
        """Remove the folder, once the result is elsewhere."""
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name or '(root)'}.safetensors"

    def _notes(self, name: str) -> Path:
        return self.folder / f"{name or '(root)'}.fit.json"

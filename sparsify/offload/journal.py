"""The journal of a run: its finished layers on disk, for an interrupted run to go on from."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.data_parallel import barrier, is_rank_zero
from sparsify.checkpoint import container
from sparsify.checkpoint.container import LayerEntry
from sparsify.checkpoint.save_load import save
from sparsify.checkpoint.weight_codec import decode_weight
from sparsify.errors import CheckpointError
from sparsify.layers import MaskedLayer
from sparsify.layers.records import LayerResult
from sparsify.outputs import is_temporary, write_text

_LAYOUT = 3  # of the folder; one of another layout is of another run
_ABOUT, _FINISHED = "run.json", "finished.jsonl"
_LAYER_KEYS, _RESULT_KEYS = ("layer", "sha256", "error", "time_s"), ("result", "about")
_TOGETHER = "layers"  # the key of a line with the entries of layers finished together
_PLAIN_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_MAX_NAME = 100


def check_unused(folder: str | os.PathLike[str], *, resume: bool) -> None:
    """Check that no run is at work in a folder and, without `resume`, that none was interrupted there.

    Raises BlockingIOError or ValueError.
    """
    finished = Path(folder) / _FINISHED
    if finished.is_file():
        os.close(_lock(finished))
    if not resume and (finished.is_file() or (Path(folder) / _ABOUT).is_file()):
        raise ValueError(f"{folder} is what an interrupted run has finished; go on with --resume, or delete it")


class Journal:
    """A folder with one checkpoint for each finished layer, and a note of the run's inputs.

    about: the note, with everything that decides the result, as text by name.
    result: the result of a finished run without the end of its clean-up, else None.

    Every finished layer is listed with its SHA-256, and checked here and at each read. The folder is locked until the
    journal is closed, deleted or collected, or its process ends in any way. Raises ValueError, with the difference, for
    the folder of another run; BlockingIOError for the folder of a process at work; CheckpointError for a folder with an
    altered layer.

    Under torchrun all processes must see the one folder; the first one writes.
    """

    def __init__(self, folder: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.about = {key: str(value) for key, value in {**about, "journal": _LAYOUT}.items()}
        self.result: dict[str, Any] | None = None
        self._layers: dict[str, dict[str, Any]] = {}  # as they are listed
        self._lines: list[set[str]] = []  # the layers of each line
        self._begun: dict[str, Any] | None = None
        self._fd, self._end = -1, 0  # of the list: open in the first process; the end of the last whole line
        self._unlock: Callable[[], object] = lambda: None
        if is_rank_zero():
            self._begin()
        barrier()
        if not (self.folder / _FINISHED).exists():
            raise ValueError(f"{self.folder}: not seen by this process; give a folder that all processes see")
        self._read_list()
        for names in self._lines:  # a layer finished together with one that is gone is not finished either
            if not all(self._file(name).exists() for name in names):
                self._layers = {name: entry for name, entry in self._layers.items() if name not in names}
        if is_rank_zero():
            for name in self._layers:
                self.read(name)
        barrier()

    def __contains__(self, name: str) -> bool:
        return name in self._layers

    @property
    def finished(self) -> list[str]:
        """The names of the finished layers."""
        return list(self._layers)

    def write(self, layers: Mapping[str, MaskedLayer]) -> None:
        """Write finished layers. A crash leaves all of them, or none."""
        if is_rank_zero():
            self._append({_TOGETHER: [self._save(name, layer) for name, layer in layers.items()]})
        barrier()  # the next to read a layer finds it
        self._read_list()

    def _save(self, name: str, layer: MaskedLayer) -> dict[str, Any]:
        """Write the file of a layer, and return its entry for the list."""
        file = self._file(name)
        file.unlink(missing_ok=True)  # `save` would follow a link
        save(layer, file)
        result = layer.pruning_result
        notes = (None, None) if result is None else (result.error, result.time_s)
        return dict(zip(_LAYER_KEYS, (name, _digest(container.read(file)[0]), *notes), strict=True))

    def read(self, name: str) -> tuple[LayerEntry, dict[str, Tensor]]:
        """Return the entry and the packed tensors of a finished layer, named without the layer.

        Raises CheckpointError if the file was altered.
        """
        file = self._file(name)
        header, tensors = container.read(file)
        if _digest(header) != self._layers[name]["sha256"] or list(header.layers) != [""]:
            raise CheckpointError(
                f"{file}: not the layer {name!r} that the run has finished (its SHA-256 is another); "
                f"delete {self.folder} to start anew"
            )
        return header.layers[""], tensors

    def fetch(self, module: nn.Module) -> None:
        """Do nothing: the model is in memory, unlike that of a DiskOffload."""

    def take_over(self, name: str, layer: MaskedLayer) -> None:
        """Give a layer of a model in memory its finished weight, mask and bias."""
        entry, tensors = self.read(name)
        weight, mask = decode_weight(entry, tensors)
        with torch.no_grad():
            layer.weight.detach().copy_(layer.as_weight(weight))
            if isinstance(bias := layer._parameters.get("bias"), Tensor):
                bias.copy_(tensors["bias"])
        layer.set_mask(mask, back_at_zero=False)
        layer.pruning_result = self.pruning_result(name)

    def pruning_result(self, name: str) -> LayerResult | None:
        """Return the pruning result of a finished layer."""
        line = self._layers[name]
        return None if line["error"] is None else LayerResult(line["error"], line["time_s"])

    def conclude(self, result: Mapping[str, Any]) -> None:
        """Note the end of the run with its result, for a resumed run to find; only `delete` is left to do."""
        self._append(dict(zip(_RESULT_KEYS, (dict(result), self.about), strict=True)))
        self._read_list()

    def delete(self) -> None:
        """Remove the files of the run, once the result is elsewhere, and the folder if nothing else is in it.

        The list goes last: after a crash at any time the resumed run knows the rest of the work.
        """
        for name in self._layers:
            self._file(name).unlink(missing_ok=True)
        for leftover in filter(is_temporary, self.folder.iterdir()):
            leftover.unlink()
        for name in (_ABOUT, _FINISHED):
            (self.folder / name).unlink(missing_ok=True)
        self.close()
        if others := sorted(file.name for file in self.folder.iterdir()):
            warnings.warn(f"{self.folder}: kept for {others[0]!r}, which the run did not write", stacklevel=2)
        elif not self.folder.is_symlink():
            self.folder.rmdir()

    def close(self) -> None:
        """Let another process have the folder."""
        self._unlock()

    def _begin(self) -> None:
        """Make the folder if need be, lock it, and write the note of the run, or compare it."""
        about, finished = self.folder / _ABOUT, self.folder / _FINISHED
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{self.folder}: a run keeps its finished layers in a folder of this name; move it")
        self.folder.mkdir(parents=True, exist_ok=True)
        others = sorted(file.name for file in self.folder.iterdir() if not is_temporary(file))
        if others and not {_ABOUT, _FINISHED} & set(others):
            raise ValueError(
                f"{self.folder}: a folder with other files in it ({others[0]!r}), and a run starts in an empty "
                "one; move them, or choose another --out"
            )
        self._fd = _lock(finished, create=True)
        self._unlock = weakref.finalize(self, os.close, self._fd)
        self._read_list()
        os.ftruncate(self._fd, self._end)  # a crash may have cut the last line
        if self._begun is None and not about.exists():
            about.unlink(missing_ok=True)  # a link to nowhere would be followed
            write_text(about, json.dumps(self.about, indent=1))
        begun = _parse(about, about.read_bytes()) if self._begun is None else self._begun
        if odd := [key for key in {**self.about, **begun} if begun.get(key) != self.about.get(key)]:
            raise ValueError(
                f"{self.folder}: begun by a run with another {odd[0]} ({begun.get(odd[0])}, now "
                f"{self.about.get(odd[0])}); give the same, or delete the folder to start anew"
            )

    def _read_list(self) -> None:
        """Read the new lines of the list."""
        finished = self.folder / _FINISHED
        if is_rank_zero():
            # POSIX: to close the file anywhere in the process with its lock would release the lock.
            text = os.pread(self._fd, os.fstat(self._fd).st_size - self._end, self._end)
        else:
            with open(finished, "rb") as file:
                file.seek(self._end)
                text = file.read()
        *lines, torn = text.split(b"\n")
        self._end += len(text) - len(torn)
        for line in lines:
            entry = _parse(finished, line, (_TOGETHER,), _RESULT_KEYS)
            if "result" in entry:
                self.result, self._begun = entry["result"], entry["about"]
            else:
                layers = {layer["layer"]: layer for layer in _layers_of(finished, entry)}
                self._lines.append(set(layers))
                self._layers |= layers

    def _append(self, line: Mapping[str, Any]) -> None:
        """Add a line to the list, all of it or nothing, and wait until it is on disk."""
        text = json.dumps(line).encode() + b"\n"
        end = os.fstat(self._fd).st_size
        try:
            while text:
                text = text[os.write(self._fd, text) :]
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, end)
            raise

    def _file(self, name: str) -> Path:
        """Return the file of a layer, a direct child of the folder.

        A name may hold anything, slashes too, be longer than that of a file, or differ from another in case only.
        """
        if not _PLAIN_NAME.fullmatch(name) or len(name) > _MAX_NAME:
            readable = re.sub(r"[^a-z0-9_.]+", "-", name.lower())[:_MAX_NAME].strip(".-")
            digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
            name = f"{readable or 'root'}-{digest}"
        return self.folder / f"{name}.safetensors"


def _lock(path: Path, *, create: bool = False) -> int:
    """Open a file and lock it for this process. Raises BlockingIOError if another one has it.

    Where the file system has no locks, the file is open all the same.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o666)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(fd)
                raise BlockingIOError(
                    f"{path.parent}: another run is at work there; wait until it has ended, or choose another --out"
                ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)  # the other run has just ended and deleted its list


def _parse(file: Path, text: bytes, *keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON object that has exactly one of these sets of keys, if any are given."""
    try:
        value: Any = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or (keys and all(value.keys() != set(allowed) for allowed in keys)):
        raise CheckpointError(f"{file}: was altered; delete {file.parent} to start anew")
    return dict(value)


def _layers_of(file: Path, line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a line of finished layers."""
    entries = line[_TOGETHER]
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and entry.keys() == set(_LAYER_KEYS) and isinstance(entry["layer"], str)
        for entry in entries
    ):
        raise CheckpointError(f"{file}: was altered; delete {file.parent} to start anew")
    return entries


def _digest(header: container.Header) -> str:
    """Return a SHA-256 of a whole file: of its header, with the SHA-256 of each tensor in it."""
    return hashlib.sha256(header.model_dump_json().encode()).hexdigest()

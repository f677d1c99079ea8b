"""The file: safetensors with a header for every tensor and its purpose. docs/formats.md gives it byte by byte.

Writing is atomic. Reading trusts nothing: no pickle, and every tensor must be listed with the SHA-256 of its dtype,
shape and bytes, and the header with its own hash: no flipped or missing byte goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic_core
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor
from torch.nn.parameter import is_lazy

from sparsify.checkpoint.tensor_file import DTYPES, TensorFile
from sparsify.errors import CheckpointError
from sparsify.layers.records import FormChoice, LayerRecord
from sparsify.outputs import check_writable, new_file

#: The newest version, and the first one with int8 values. A file without them is written in version 1.
VERSION = INT8_VERSION = 2

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Size = Annotated[int, Field(ge=0, le=2**31 - 1)]


class LayerEntry(BaseModel):
    """Entry of one layer in the header: its module when loaded, and the format of its weight.

    dequantized: the dtype of the weight that int8 values stand for; "" if the values themselves are the weight.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    module: Literal["SparseLinear", "CSRLinear", "Linear", "Embedding"]
    format: Literal["csr", "bitmask", "dense"]
    out_features: _Size
    in_features: _Size
    dequantized: Literal["", "F64", "F32", "F16", "BF16"] = ""

    @model_validator(mode="after")
    def _embeddings_are_int8(self) -> LayerEntry:
        if self.module == "Embedding" and (self.format != "dense" or not self.dequantized):
            raise ValueError("an Embedding has int8 rows, and the format dense")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight."""
        return self.out_features, self.in_features


class Header(BaseModel):
    """The metadata entry `sparsify` of a file; `records` is an entry of its own, which old readers pass by."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    version: int
    layers: dict[str, LayerEntry]
    aliases: dict[str, str]
    choices: dict[str, FormChoice] = {}
    tensors: dict[str, _Sha256]
    records: dict[str, LayerRecord] = Field(default={}, exclude=True)


_RECORDS = TypeAdapter(dict[str, LayerRecord])


def write(
    path: str | os.PathLike[str],
    layers: Mapping[str, LayerEntry],
    aliases: Mapping[str, str],
    choices: Mapping[str, FormChoice],
    tensors: Mapping[str, Tensor],
    records: Mapping[str, LayerRecord],
) -> None:
    """Write a file, complete or not at all: an old file at `path` stays until the new one is whole on disk.

    Each tensor is looked up twice, to hash and to write it, and held no longer: a mapping of tensors in other files
    needs memory for one of them.
    """
    check_writable(path, "cannot save to ")
    places: dict[str, tuple[str, list[int], int]] = {}  # dtype, shape, bytes
    hashes, widths = {}, {}
    for name in tensors:
        if name == "__metadata__":
            raise ValueError(f"{name}: a file cannot hold a tensor of this name; rename it")
        tensor = _plain(check_storable(name, tensors[name]))
        places[name] = DTYPES[tensor.dtype], list(tensor.shape), tensor.nbytes
        hashes[name], widths[name] = _sha256(tensor), tensor.element_size()
    # Safetensors' own order: the widest first, so that each tensor lies at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-widths[name], name))
    header = header_of(layers, aliases, choices, hashes, records)
    metadata = {"format": "pt", **metadata_of(header)}
    with new_file(path, "cannot save to ") as file:
        file.write(_safetensors_header({name: places[name] for name in order}, metadata))
        for name in order:
            file.write(_raw(_plain(tensors[name])))


def header_of(
    layers: Mapping[str, LayerEntry],
    aliases: Mapping[str, str],
    choices: Mapping[str, FormChoice],
    hashes: Mapping[str, str],
    records: Mapping[str, LayerRecord],
) -> Header:
    """Return the header of these contents, in the lowest version that can hold them."""
    version = INT8_VERSION if any(entry.dequantized for entry in layers.values()) else 1
    return Header(
        version=version,
        layers=dict(layers),
        aliases=dict(aliases),
        choices=dict(choices),
        tensors=dict(hashes),
        records=dict(records),
    )


def metadata_of(header: Header) -> dict[str, str]:
    """Return the entries of a file's metadata for a header."""
    text = header.model_dump_json(exclude_unset=True)
    metadata = {"sparsify": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    if header.records:
        records = _RECORDS.dump_json(header.records, exclude_defaults=True)
        metadata |= {"records": records.decode(), "records_sha256": hashlib.sha256(records).hexdigest()}
    return metadata


def hash_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor, as a header has it."""
    return _sha256(_plain(tensor))


def check_storable(name: str, value: object) -> Tensor:
    """Return a state if a file can hold it. Raises ValueError with the way out."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: a checkpoint holds tensors only, got {type(value).__name__} (get_extra_state?)")
    if is_lazy(value):
        raise ValueError(f"{name}: it is not initialised yet; run one batch through the model first")
    if type(value).__name__ == "DTensor":
        raise ValueError(
            f"{name}: it is a DTensor, sharded over processes; gather the model's state_dict "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load it into "
            "a model that is not sharded, and save that"
        )
    if hasattr(value, "__tensor_flatten__"):  # quantized, nested and the like: a wrapper around other tensors
        raise ValueError(f"{name}: a file cannot hold a {type(value).__name__}; turn it into a plain tensor first")
    if value.is_meta:
        raise ValueError(f"{name}: it is on the meta device and has no data; load the model's weights first")
    if value.layout is not torch.strided or value.is_quantized:
        raise ValueError(f"{name}: a file cannot hold {value.dtype} in {value.layout}; make it a dense tensor first")
    if value.dtype not in DTYPES:
        way_out = "keep torch.view_as_real of it" if value.is_complex() else "convert it"
        raise ValueError(
            f"{name}: a file cannot hold {value.dtype}; {way_out}, or register the buffer with persistent=False "
            "if the model can build it"
        )
    return value


def read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    """Read a whole file and check every hash; tensors come in the header's order, the same in every process.

    Raises CheckpointError, or OSError for a path that cannot be opened.
    """
    with TensorFile(path) as file:
        header = read_header(file.metadata, path)
        if odd := sorted(set(file) ^ set(header.tensors)):
            raise CheckpointError(f"{path}: the file and its header disagree about the tensor {odd[0]!r}")
        return header, {name: read_tensor(file, name, header.tensors[name], path) for name in header.tensors}


def read_header(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> Header:
    """Return the header in a file's metadata, checked by its hash. Raises CheckpointError."""
    text = metadata.get("sparsify")
    if text is None:
        raise CheckpointError(
            f"{path}: a safetensors file, but not one written by sparsify.save (it has no sparsify header)"
        )
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):
        raise CheckpointError(f"{path}: the header was altered (its SHA-256 does not match)")
    try:
        parsed = pydantic_core.from_json(text)
        version = parsed.get("version") if isinstance(parsed, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise CheckpointError(
                f"{path}: written in format version {version}, this sparsify reads up to {VERSION}; upgrade it"
            )
        header = Header.model_validate_json(text)
        if "records" in parsed:
            raise CheckpointError(f"{path}: the header is wrong: `records` is an entry beside it")
        header = header.model_copy(update={"records": _read_records(metadata, path)})
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{path}: the header is wrong at {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is no valid JSON ({error})") from None
    if header.version < 1:
        raise CheckpointError(f"{path}: there is no format version {header.version}")
    if header.version < INT8_VERSION and any(entry.dequantized for entry in header.layers.values()):
        raise CheckpointError(f"{path}: the header is wrong: version {header.version} has no int8 values")
    return header


def _read_records(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> dict[str, LayerRecord]:
    text = metadata.get("records")
    if (None if text is None else hashlib.sha256(text.encode()).hexdigest()) != metadata.get("records_sha256"):
        raise CheckpointError(f"{path}: the records of its layers were altered (their SHA-256 does not match)")
    return {} if text is None else _RECORDS.validate_json(text)


def read_tensor(file: TensorFile, name: str, sha256: str, path: str | os.PathLike[str]) -> Tensor:
    """Read a tensor and check its hash. Raises CheckpointError."""
    tensor = file.read(name)
    if _sha256(tensor) != sha256:
        raise CheckpointError(f"{path}: tensor {name!r} was altered (its SHA-256 does not match)")
    return tensor


def _safetensors_header(places: Mapping[str, tuple[str, list[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes before the tensors' own: the length of a JSON object, and the object, padded with spaces.

    Not safetensors.torch.save_file: it writes the metadata in another order each time, makes the file private, refuses
    tensors with common memory, and reports a full disk by an error of its own.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, n_bytes) in places.items():
        begin, end = end, end + n_bytes
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().resolve_neg()


def _sha256(tensor: Tensor) -> str:
    """Hash "F32 3,4 " (dtype and shape) and the bytes in row-major order."""
    digest = hashlib.sha256(f"{DTYPES[tensor.dtype]} {','.join(map(str, tensor.shape))} ".encode())
    digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> Any:
    """Return the bytes of a contiguous tensor in CPU memory, as a buffer over the same memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()

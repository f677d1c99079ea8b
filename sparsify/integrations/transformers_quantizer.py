"""All hooks of transformers: `from_pretrained` and `save_pretrained` of models with layers of ours.

`register` adds our quantizer to the tables of transformers, and lets `save_pretrained` of a model with layers of ours
use it. A model carries no mark of a quantizer, in memory or after loading: its layers say what it is.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from sparsify.checkpoint.container import Header
from sparsify.checkpoint.folder import Place, kind_of, read_headers, tensors_and_metadata
from sparsify.checkpoint.waiting_layers import WaitingWeight, await_layers, make_waiting_layers
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.errors import CheckpointError
from sparsify.integrations import transformers_vocabulary
from sparsify.integrations.accelerate_hooks import without_hooks
from sparsify.integrations.pretrained import facts_of
from sparsify.integrations.sparsify_config import QuantMethod, SparsifyConfig
from sparsify.layer_names import join
from sparsify.layers import MaskedLayer
from sparsify.layers.fsdp import check_whole, refuse_flattened
from sparsify.reporting.model_card import write_card

#: In config.json of an exported model as `transformers_weights`: transformers alone takes it for a file's name, and
#: stops with it; our quantizer takes it away before files are looked for.
NEEDS_US = "none: the weights are packed by sparsify; run pip install sparsify-torch, and import sparsify first"


class SparsifyQuantizer(HfQuantizer):
    """Loads a folder of ours, or prunes a dense model while loading it; and saves."""

    quantization_config: Any
    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    _header: Header
    _source: str
    _ties: dict[str, str]
    _dtype: torch.dtype | None

    def is_serializable(self) -> bool:
        """Every model with layers of ours can be saved."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a pruning without a target, and one of a model that is sparse already."""
        if not self.pre_quantized and not self.quantization_config.prunes:
            raise ValueError("SparsifyConfig: give a sparsity, or a pattern such as '2:4'")

    def update_attn_implementation(self, config: Any) -> Any:
        """Take the sentence for readers without us out of the configuration, before files are looked for."""
        if getattr(config, "transformers_weights", None) == NEEDS_US:
            del config.transformers_weights
        return config

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Note the dtype, of which the next step is not told."""
        self._dtype = dtype
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Check the files, and let the layers wait for their tensors."""
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise CheckpointError("quantization_config names sparsify, but there are no files with its layers")
        self._source = os.path.dirname(checkpoint_files[0])
        header, places = read_headers(checkpoint_files)
        header, places, whole = _under_the_names_of(model, header, places)
        found = {entry.module == "SparseLinear" for entry in header.layers.values()}
        if header.layers and found != {self.quantization_config.layers == "masked"}:
            raise CheckpointError(
                f"{self._source}: config.json says {self.quantization_config.layers} layers, the files do not"
            )
        self._ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = ties = _ties_left_to_transformers(model, header)
        await_layers(model, header, places, tied={*ties, *ties.values()}, partly=not whole)
        for module in model.modules():
            if any(isinstance(child, WaitingWeight) for child in module.children()):
                module._is_hf_initialized = True  # else transformers would draw random weights for it
        self._header = header

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Make the layers, or prune; and take away the marks of a quantizer."""
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        if self.pre_quantized:
            with without_hooks(model, list(self._header.layers)):
                make_waiting_layers(model, self._header, self._source, dtype=self._dtype)
            model.all_tied_weights_keys = self._ties
        else:
            self.quantization_config.prune(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors of a model for its files, and their metadata."""
        return tensors_and_metadata(model, left_out=tuple(model._keys_to_ignore_on_save or ()))


def register() -> None:
    """Add the quantizer to transformers, once."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.SPARSIFY.value] = SparsifyConfig
    AUTO_QUANTIZER_MAPPING[QuantMethod.SPARSIFY.value] = SparsifyQuantizer
    if not hasattr(PreTrainedModel.save_pretrained, "of_sparsify"):
        model_class: Any = PreTrainedModel
        model_class.save_pretrained = _saving(model_class.save_pretrained)
        model_class._upload_modified_files = _uploading(model_class._upload_modified_files)
    transformers_vocabulary.register(PreTrainedModel)


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `save_pretrained` for every model: as before, unless it has layers of ours."""

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        kind = None if getattr(self, "_hf_peft_config_loaded", False) else kind_of(self)
        if kind is None or (kwargs.get("state_dict") is not None and _in_pieces(self)):
            return original(self, save_directory, *args, **kwargs)  # of pieces: the Trainer's gathered state as it is
        if kwargs.get("distributed_checkpoint"):
            raise ValueError("distributed_checkpoint=True: sparse layers are saved whole; leave it out")
        kwargs["save_original_format"] = False  # names of tensors as the header has them
        with _as_quantized(self, kind):
            result = original(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", args[0] if args else True):
            finish_folder(self, save_directory, kind)
        return result

    save_pretrained.of_sparsify = True  # type: ignore[attr-defined]
    return save_pretrained


def _uploading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the upload of a folder: as before, after the last touch to the folder of a model with layers of ours."""

    @functools.wraps(original)
    def upload(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, PreTrainedModel) and (kind := kind_of(self)) is not None:
            finish_folder(self, working_dir, kind)
        return original(self, working_dir, *args, **kwargs)

    return upload


def finish_folder(model: nn.Module, folder: Any, kind: str) -> None:
    """Add to a saved folder what transformers does not write itself."""
    file = Path(folder) / "config.json"
    if kind == "packed" and file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        content["transformers_weights"] = NEEDS_US
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_card(folder, model, facts_of(model))


def _in_pieces(model: nn.Module) -> bool:
    """Return whether FSDP has flattened or sharded a masked weight: only a gathered state has it whole."""
    try:
        for name, layer in layers_of_type(model, MaskedLayer).items():
            refuse_flattened(name, layer)
            check_whole(name, layer.weight)
    except ValueError:
        return True
    return False


@contextmanager
def _as_quantized(model: Any, kind: str) -> Iterator[None]:
    """Let a model look quantized by us inside the block."""
    config: Any = SparsifyConfig(layers=kind)
    before = vars(model).get("hf_quantizer")
    model.hf_quantizer = SparsifyQuantizer(config)
    model.config.quantization_config = config
    try:
        yield
    finally:
        del model.config.quantization_config
        del model.hf_quantizer
        if before is not None:
            model.hf_quantizer = before


def _under_the_names_of(model: Any, header: Header, places: dict[str, Place]) -> tuple[Header, dict[str, Place], bool]:
    """Return the header and places by the names of a model: with a head, or only the base of a model with one.

    The third is whether the file should hold the state of the model exactly.
    """
    prefix = f"{model.base_model_prefix}."
    has_base = hasattr(model, model.base_model_prefix) if model.base_model_prefix else True
    in_file = [name for name in places if name.startswith(prefix)]
    if has_base and not in_file and model.base_model_prefix:
        return _renamed(header, places, lambda name: prefix + name)
    if not has_base and in_file:
        return _renamed(header, places, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
    return header, places, True


def _renamed(
    header: Header, places: dict[str, Place], rename: Callable[[str], str | None]
) -> tuple[Header, dict[str, Place], bool]:
    def renamed(table: dict[str, Any]) -> dict[str, Any]:
        return {new: value for name, value in table.items() if (new := rename(name)) is not None}

    aliases = {
        new: other
        for alias, name in header.aliases.items()
        if (new := rename(alias)) is not None and (other := rename(name)) is not None
    }
    tables = ("layers", "choices", "tensors", "records")
    changes = {table: renamed(getattr(header, table)) for table in tables}
    return header.model_copy(update={**changes, "aliases": aliases}), renamed(places), False


def _ties_left_to_transformers(model: Any, header: Header) -> dict[str, str]:
    """Return the ties of a model without those of packed weights: they are no Parameters."""
    packed = {join(name, "weight") for name, entry in header.layers.items() if entry.module != "SparseLinear"}
    ours = packed | {alias for alias, name in header.aliases.items() if name in packed}
    ties = model.all_tied_weights_keys
    return {target: source for target, source in ties.items() if target not in ours and source not in ours}

"""All hooks of diffusers: `from_pretrained` and `save_pretrained` of models with layers of ours.

diffusers has the design of transformers without its functions to register, and stops by itself at an unknown
quantization method. So an entry in its two tables is all that loading needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor

from sparsify.checkpoint.container import Header
from sparsify.checkpoint.folder import kind_of, read_headers, tensors_and_metadata
from sparsify.checkpoint.waiting_layers import await_layers, make_waiting_layers
from sparsify.errors import CheckpointError
from sparsify.integrations.accelerate_hooks import without_hooks
from sparsify.integrations.pretrained import facts_of
from sparsify.integrations.sparsify_config import QuantMethod, SparsifyConfig
from sparsify.reporting.model_card import write_card


class SparsifyDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Loads a folder of ours, or prunes a dense model while loading it; and saves."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = True
    is_compileable = True

    _files: Sequence[str] = ()
    _header: Header
    _dtype: torch.dtype | None = None
    #: The model to be saved: diffusers tells the quantizer its state only.
    saving: Any = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a pruning without a target."""
        if not self.pre_quantized and not self.quantization_config.prunes:
            raise ValueError("SparsifyConfig: give a sparsity, or a pattern such as '2:4'")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Note the dtype; without one, diffusers takes torch's default."""
        self._dtype = torch_dtype or torch.get_default_dtype()
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        """Note the files."""
        self._files = [checkpoint_files] if isinstance(checkpoint_files, str) else list(checkpoint_files or ())
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """Check the files, and let the layers wait for their tensors."""
        model.is_quantized = False  # it stays a plain model, for `.to(dtype)` and the like
        if not self.pre_quantized:
            return
        if not self._files:
            raise CheckpointError("quantization_config names sparsify, but there are no files with its layers")
        self._header, places = read_headers(self._files)
        await_layers(model, self._header, places)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Make the layers, or prune."""
        if self.pre_quantized:
            with without_hooks(model, list(self._header.layers)):
                make_waiting_layers(model, self._header, self._files[0], dtype=self._dtype)
        else:
            self.quantization_config.prune(model)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors of a model for its files, and their metadata."""
        return tensors_and_metadata(self.saving)

    def _dequantize(self, model: Any) -> Any:
        """Turn the layers into dense ones."""
        from sparsify.conversion.convert import to_dense

        return to_dense(model)


def register() -> None:
    """Add the quantizer to diffusers, once."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.SPARSIFY.value] = SparsifyConfig
    AUTO_QUANTIZER_MAPPING[QuantMethod.SPARSIFY.value] = SparsifyDiffusersQuantizer
    model_class: Any = ModelMixin
    if not hasattr(model_class.save_pretrained, "of_sparsify"):
        model_class.save_pretrained = _saving(model_class.save_pretrained)
        model_class._upload_folder = _uploading(model_class._upload_folder)


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `save_pretrained` for every model: as before, unless it has, or had, layers of ours."""

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        kind = kind_of(self)
        ours = isinstance(getattr(self, "hf_quantizer", None), SparsifyDiffusersQuantizer)
        if kind is None and not ours:
            return original(self, save_directory, *args, **kwargs)
        if kind is not None and kwargs.get("safe_serialization") is False:
            raise ValueError("safe_serialization=False: sparse layers are saved as safetensors only; leave it out")
        with _as_quantized(self, kind):
            result = original(self, save_directory, *args, **kwargs)
        if kind is not None:
            write_card(save_directory, self, facts_of(self))
        return result

    save_pretrained.of_sparsify = True  # type: ignore[attr-defined]
    return save_pretrained


def _uploading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the upload of a folder: as before, with our part in the card of a model with layers of ours."""

    @functools.wraps(original)
    def upload(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if kind_of(self) is not None:
            write_card(working_dir, self, facts_of(self))
        return original(self, working_dir, *args, **kwargs)

    return upload


@contextmanager
def _as_quantized(model: Any, kind: str | None) -> Iterator[None]:
    """Let a model look quantized by us inside the block, or, without layers of ours, not at all."""
    before, config = vars(model).get("hf_quantizer"), model._internal_dict
    model.hf_quantizer = None
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if kind is not None:
        own: Any = SparsifyConfig(layers=kind)
        model.hf_quantizer = SparsifyDiffusersQuantizer(own)
        model.hf_quantizer.saving = model
        plain["quantization_config"] = own
    model._internal_dict = type(config)(plain)
    try:
        yield
    finally:
        model._internal_dict = config
        model.hf_quantizer = before
        if before is None:
            del model.hf_quantizer

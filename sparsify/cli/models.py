"""Models by name, for the command line: torchvision:vit_b_16, timm:NAME, hf:FOLDER, package.module:builder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsify.checkpoint.dense_weights import check_weights
from sparsify.cli.user_code import WAY_OUT, blaming, load_function
from sparsify.cli.weights_file import read_weights
from sparsify.offload.disk_offload import parameters_on_meta
from sparsify.recipes.yaml_file import nearest


def build_model(spec: str, *, here: bool = True) -> nn.Module:
    """Build a model by name, in eval mode.

    "torchvision:NAME" and "timm:NAME" have random weights, "hf:FOLDER" loads the weights in a folder written by
    save_pretrained (nothing is downloaded, and no code in it runs), "package.module:builder" calls a function of no
    arguments; with `here`, its module may lie in the present folder. Raises ValueError with the way out.
    """
    source, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"model {spec!r}: write torchvision:NAME, timm:NAME, hf:FOLDER or package.module:builder")
    if source == "torchvision":
        return _torchvision(name).eval()
    if source == "timm":
        return _timm(name).eval()
    if source == "hf":
        return _transformers(name).eval()
    way_out = WAY_OUT if here else f"nothing is imported from this folder here; write --model {spec}"
    model = load_function(spec, f"model {spec!r}", way_out=way_out, here=here)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec!r}: {name}() returned a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a dense state_dict from .safetensors, or from .pt/.pth/.bin opened with weights_only, without running code.

    Raises ValueError if the file is neither, or is not for this model: another shape or kind of value, NaN.
    """
    state = read_weights(Path(path))
    own = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if isinstance(wanted := own.get(name), Tensor) and not is_lazy(wanted):
            check_weights(path, name, tensor, wanted)
    with blaming(str(path)):
        keys = model.load_state_dict(state, strict=False)
    covered = {id(own[name]) for name in state if name in own}  # a tied tensor may be stored once
    missing = [name for name in keys.missing_keys if id(own.get(name)) not in covered]
    if missing or keys.unexpected_keys:
        raise ValueError(
            f"{path}: not for this model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(keys.unexpected_keys)} are too many {keys.unexpected_keys[:3]}"
        )


def _torchvision(name: str) -> nn.Module:
    _check_torchvision(name)
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None)
    return model


def _check_torchvision(name: str) -> None:
    """Raise ValueError if torchvision or its model of this name is not there."""
    try:
        from torchvision.models import list_models
    except ImportError:
        raise ValueError("torchvision is not installed: pip install 'sparsify-torch[vision]'") from None
    if name not in list_models():
        raise ValueError(f"torchvision has no model {name!r}{nearest(name, list_models())}")


def named_weights(spec: str, weights: str) -> Any:
    """Return torchvision's weights of a model by their name ("DEFAULT"), or None if they mean a file.

    Raises ValueError for a name that is neither a file nor among the model's weights.
    """
    source, _, name = spec.partition(":")
    if source != "torchvision" or os.path.exists(weights) or Path(weights).suffix:
        return None
    _check_torchvision(name)
    from torchvision.models import get_model_weights

    known = get_model_weights(name).__members__
    if weights not in known:
        raise ValueError(f"--weights {weights}: no file, and none of torchvision's for {name}: {', '.join(known)}")
    return known[weights]


def default_weights(spec: str) -> Any:
    """Return torchvision's default weights of a model, or None if it has no weights for the model."""
    name = spec.partition(":")[2]
    _check_torchvision(name)
    from torchvision.models import get_model_weights

    return get_model_weights(name).__members__.get("DEFAULT")


def build_pretrained(spec: str, weights: Any) -> nn.Module:
    """Build a model of torchvision with its pretrained weights, which torchvision downloads. Raises ValueError."""
    from torchvision.models import get_model

    name = spec.partition(":")[2]
    try:
        model: nn.Module = get_model(name, weights=weights)
    except OSError as error:  # no network, or no room
        raise ValueError(
            f"--weights {weights.name}: torchvision cannot fetch {weights.url}: {error}; "
            "download the file and give its path"
        ) from None
    return model.eval()


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ValueError("timm is not installed: pip install 'sparsify-torch[vision]'") from None
    if name not in timm.list_models():
        raise ValueError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def build_empty(spec: str) -> tuple[nn.Module, Path | None]:
    """Build a model without memory for its weights; also return the folder of its weights for hf:FOLDER."""
    source, _, name = spec.partition(":")
    with parameters_on_meta():
        if source != "hf":
            return build_model(spec), None
        config, kind = _hf_kind(name)
        with blaming(f"hf:{name}"):
            model: nn.Module = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    return model.eval(), Path(name)


def _transformers(folder: str) -> nn.Module:
    config, kind = _hf_kind(folder)
    if sys.stderr is None or not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
    with blaming(f"hf:{folder}"):
        model: nn.Module = kind.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    return model


def _hf_kind(folder: str) -> tuple[Any, Any]:
    """Return the configuration in a folder, and the class of its model: one of transformers' own."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"hf:{folder}: there is no config.json in this folder; nothing is downloaded")
    try:
        from transformers import AutoConfig, AutoModel, PreTrainedModel
    except ImportError:
        raise ValueError("transformers is not installed: pip install 'sparsify-torch[hf]'") from None
    import transformers

    with blaming(f"hf:{folder}: config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        _check_runs_no_code(content)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    named = content.get("architectures") or []
    types = [getattr(transformers, str(name), None) for name in (named if isinstance(named, list) else [named])]
    kinds = (kind for kind in types if isinstance(kind, type) and issubclass(kind, PreTrainedModel))
    return config, next(kinds, AutoModel)


def _check_runs_no_code(content: Any) -> None:
    """Refuse a configuration with Python code of its folder, or with kernels from the network."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "auto_map":
                raise ValueError(
                    "'auto_map' names Python code in the folder, and no such code is run; build the model with a "
                    "package.module:builder of yours, or take the key out if transformers has this model itself"
                )
            if "implementation" in key and isinstance(value, str) and "/" in value:
                raise ValueError(f"{key!r} names code to download, {value!r}, and nothing is downloaded; take it out")
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        _check_runs_no_code(value)

"""Load folders of models in a new process: first with transformers alone, then with this library imported after it.

Writes a file of what was found: the errors of the first, the outputs of the second.
"""

import sys
from pathlib import Path

import torch
import transformers


def error_of(name: str, folder: Path) -> str:
    from small_auto import AUTO

    try:
        getattr(transformers, AUTO[name]).from_pretrained(folder)
    except ValueError as error:
        return str(error)
    return "none"


def main(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    transformers.logging.set_verbosity_error()
    errors = {name: error_of(name.partition("-")[0], folder / name) for name in names}
    assert "sparsify" not in sys.modules

    from small_auto import AUTO
    from small_models import outputs

    import sparsify

    found = {}
    for name in names:
        kind = name.partition("-")[0]
        model = getattr(transformers, AUTO[kind]).from_pretrained(folder / name)
        own = sum(isinstance(m, (sparsify.layers.PackedLayer, sparsify.layers.MaskedLayer)) for m in model.modules())
        found[name] = {"outputs": outputs(kind, model), "n_layers": own}
    torch.save({"errors": errors, "found": found}, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Forward's signature says what the elements of a batch are; where it does not, the error does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import convert, export, inspect, prune, recover
from sparsify.calibration.batches import Batch, read_batches, read_example
from sparsify.pruning.sensitivity import measure_sensitivity

X, LABELS = torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3


class Net(nn.Module):
    """Takes a mask, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h if mask is None else h * mask[:, None]) * scale


class Both(Net):
    """Needs the mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, mask)


class Wrapper(nn.Module):
    """Hands everything on, as DDP and compiled models do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)


VERBS: dict[str, Callable[[nn.Module, Any], object]] = {
    "prune": lambda model, batch: prune(model, 0.5, method="wanda", data=[batch]),
    "recover": lambda model, batch: recover(model, convert(Net()), [batch], steps=1),
    "sensitivity": lambda model, batch: measure_sensitivity(model, [batch], sparsities=(0.5,)),
    "export": lambda model, batch: export(model, example=batch),
    "inspect": lambda model, batch: inspect(model, batch),
    "apply": lambda model, batch: sparsify.apply(
        model, sparsify.Recipe(groups=[{"sparsity": 0.5, "method": "wanda"}]), data=[batch]
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_label_is_no_optional_argument(verb: str, wrapped: bool) -> None:
    model = convert(Wrapper(Net()) if wrapped else Net())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"tuple of 2, .* 2 would become 'mask'.* \{'x': \.\.\., 'mask'"):
        VERBS[verb](model, (X, LABELS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_the_signature_says() -> None:
    def read(model: nn.Module, batch: Any) -> Batch:
        return read_batches(model, [batch])[0]

    assert len(read(nn.Linear(8, 4), (X, LABELS)).args) == 1  # no second parameter: left out
    assert len(read(Both(), (X, LABELS)).args) == 2  # needed
    assert len(read(Both(), (X, LABELS, "label")).args) == 2
    assert len(read(Net(), (X, None)).args) == 2  # its default
    assert list(read(Both(), [X, LABELS]).named) == ["x", "mask"]
    assert list(read(Net(), {"mask": LABELS, "x": X}).named) == ["x", "mask"]
    assert read(Wrapper(Net()), (X,)).args[0] is X
    with pytest.raises(ValueError, match="the example is a tuple of 2"):
        read_example(Net(), (X, LABELS))


def test_a_loss_is_no_output() -> None:
    class WithLoss(Net):
        def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            out = super().forward(x)
            return nn.functional.cross_entropy(out, labels), out

    with pytest.raises(ValueError, match="one number first, as it does with a loss; leave labels out"):
        measure_sensitivity(convert(WithLoss()), [(X, LABELS)], sparsities=(0.5,))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_batches_made_in_inference_mode(method: str) -> None:
    torch.manual_seed(0)
    model, other = convert(Net()), convert(Net())
    other.load_state_dict(model.state_dict())
    with torch.inference_mode():
        made = [X.clone() * 1.0]
        prune(model, 0.5, method=method, data=made)
        assert not read_batches(model, (X.clone() for _ in range(2)))[0].args[0].is_inference()
    prune(other, 0.5, method=method, data=[X])
    assert torch.equal(model.b.mask, other.b.mask)


def test_a_model_made_in_inference_mode_whose_parameter_is_an_input() -> None:
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.a, self.b = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.query) + self.b(x).mean(0)

    with torch.inference_mode():
        model = Query()
    assert prune(convert(model), 0.5, method="wanda", data=[X]).a.sparsity == 0.5

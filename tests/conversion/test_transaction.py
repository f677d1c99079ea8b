"""A block that raises leaves the model as it was: structure, attributes, hooks, memory, gradients, kept contents."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.conversion.module_surgery import replace_in_place
from sparsify.conversion.transaction import Transaction


class Stop(BaseException):
    """No Exception, as an interruption is none."""


def build() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    model[0].weight.grad = torch.ones(3, 4)
    model[0].notes = {"a": [1], "b": 2}
    model[1].register_forward_hook(lambda *_: None)
    return model


def zero(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.zero_()


def set_data(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


#: Ways to change a model; what they write into is kept.
CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "contents": lambda m: [zero(t) for t in m.state_dict(keep_vars=True).values()],
    "contents past the version counter": lambda m: m[0].weight.data.fill_(7),
    "the class": lambda m: sparsify.convert(m),
    "a layer is another": lambda m: replace_in_place(m[0], nn.Conv2d(1, 1, 1)),
    "a child replaced": lambda m: m.__setitem__(1, nn.Identity()),
    "a child more": lambda m: m.append(nn.ReLU()),
    "a Parameter less": lambda m: setattr(m[0], "bias", None),
    "a Parameter more": lambda m: m[2].register_parameter("bias", nn.Parameter(torch.zeros(3))),
    "a buffer more": lambda m: m[0].register_buffer("mask", torch.ones(1), persistent=False),
    "an attribute": lambda m: m[0].notes.pop("b"),
    "a method": lambda m: setattr(m[0], "forward", lambda x: x),
    "a hook more": lambda m: m[0].register_forward_pre_hook(lambda *_: None),
    "hooks less": lambda m: m[1]._forward_hooks.clear(),
    "the mode": lambda m: m.eval(),
    "requires_grad": lambda m: m.requires_grad_(False),
    "the gradient": lambda m: m.zero_grad(),
    "the memory": lambda m: set_data(m[0].weight, torch.zeros(3, 4)),
    "the dtype": lambda m: m.double(),
    "the layout": lambda m: set_data(m[0].weight, torch.zeros(4, 3).T),
}


def fail(model: nn.Module, keep: Iterable[Tensor], *changes: Callable[[], object]) -> None:
    """Keep the tensors before each change, and raise when all are made."""

    def run() -> None:
        with Transaction(model) as undo:
            for change in changes:
                undo.keep(keep)
                change()
            raise Stop

    with pytest.raises(Stop):
        run()


def picture(model: nn.Module) -> list[object]:
    """Everything about a model, by identity where that is to stay, and by value."""
    found: list[object] = []
    for name, module in model.named_modules():
        found.append((name, id(module), type(module)))
        for key, value in module.__dict__.items():
            items = list(value.items()) if isinstance(value, dict) else value
            found.append((key, id(value), str(items) if not isinstance(value, dict) else [k for k, _ in items]))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                grad = tensor.grad
                found.append((id(tensor), tensor.data_ptr(), tensor.dtype, tensor.stride(), tensor.requires_grad))
                found.append((tensor.tolist(), id(grad), None if grad is None else grad.tolist()))
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_undone(name: str) -> None:
    model = build()
    before = picture(model)
    fail(model, model.state_dict(keep_vars=True).values(), lambda: CHANGES[name](model))
    assert picture(model) == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_stays_when_nothing_raises(name: str) -> None:
    model = build()
    before = picture(model)
    with Transaction(model) as undo:
        undo.keep(model.parameters())
        CHANGES[name](model)
    assert picture(model) != before


def test_contents_come_back_as_they_were_when_first_kept() -> None:
    tensor = torch.ones(2)
    fail(nn.Module(), [tensor], tensor.zero_, lambda: tensor.fill_(2))
    assert tensor.tolist() == [1, 1]


def test_tensors_that_cannot_be_written_are_no_obstacle() -> None:
    with torch.inference_mode():
        made_inside = torch.ones(2)

    def write() -> None:
        with torch.inference_mode():
            made_inside.zero_()

    odd = [torch.ones(1).expand(3), torch.ones(2, device="meta"), nn.UninitializedParameter(), made_inside]
    model = nn.Module()
    model._buffers.update({str(number): tensor for number, tensor in enumerate(odd)})
    fail(model, odd, write)
    assert [buffer is tensor for buffer, tensor in zip(model._buffers.values(), odd, strict=True)] == [True] * 4
    assert made_inside.tolist() == [1, 1]


def test_exchanged_contents_come_back() -> None:
    shapes = [(), (0,), (5,), (3, 4), (5000, 1000)]  # the last in parts
    tensors = [torch.ones(shape) for shape in shapes] + [torch.ones(4, 3).T]
    whole = torch.ones(6)
    views = [whole[:4], whole[2:]]  # which share memory
    new = [torch.full_like(tensor, 2 + number) for number, tensor in enumerate([*tensors, *views])]

    def exchange(undo: Transaction) -> None:
        for tensor, other in zip([*tensors, *views], new, strict=True):
            undo.exchange(tensor, other)
        assert [tensor.unique().tolist() for tensor in tensors] == [[2], [], [4], [5], [6], [7]]
        assert whole.tolist() == [8, 8, 9, 9, 9, 9]

    def run() -> None:
        with Transaction() as undo:
            exchange(undo)
            raise Stop

    with pytest.raises(Stop):
        run()
    assert all(bool((tensor == 1).all()) for tensor in [*tensors, whole])

"""Which Parameters of a model are one: the same object, or the same memory."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def check_untied(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError if a weight in one of the named modules is also used by another module."""
    places: dict[object, list[tuple[str, Tensor]]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                place = f"{module_name}.{key}".lstrip("."), parameter
                places.setdefault(_memory(parameter)[0], []).append(place)
    for name in names:
        module = model.get_submodule(name)
        inside = ".*" if next(module.children(), None) is not None else ""
        for weight in module.parameters():
            used = [place for place, parameter in places[_memory(weight)[0]] if _overlap(weight, parameter)]
            if weight.ndim > 1 and len(used) > 1:
                raise ValueError(
                    f"{name}: its weight is tied: {' and '.join(used)} are one Parameter, and a mask would "
                    f"change both; leave it dense with exclude=[{name + inside!r}], or untie it first"
                )


def _memory(parameter: Tensor) -> tuple[object, int, int]:
    """Return which memory a Parameter uses, from which byte to which; one without memory to point at is its own."""
    plain = type(parameter) in (nn.Parameter, Tensor)
    if not plain or parameter.is_meta or parameter.numel() == 0:
        return id(parameter), 0, 1
    start = parameter.data_ptr()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.untyped_storage().data_ptr(), start, start + extent * parameter.element_size()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Say whether two Parameters use the same memory anywhere."""
    (memory, start, end), (other_memory, other_start, other_end) = _memory(one), _memory(other)
    return memory == other_memory and start < other_end and other_start < end

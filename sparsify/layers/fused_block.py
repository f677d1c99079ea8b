"""Fused blocks: modules that run a convolution with the BatchNorm, sum and activation after it as one call of a kernel.

`inference/fusion.py` reads a plan off a module's code: its calls in their order, some of them fused. The plan is
followed in inference, as long as the module has the children and settings that the code was read with, and nobody
watches a call that is left out. In any other case the code itself runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sparsify.kernels import ACTIVATIONS, Norm
from sparsify.kernels.cpu.convolution import is_channels_last
from sparsify.layers.csr_convolution import CSRConvolution
from sparsify.layers.deferred import unfuse_activations
from sparsify.layers.depthwise import DepthwiseConv2d
from sparsify.layers.inference_mode import in_plain_inference
from sparsify.layers.max_pool import MaxPool2d
from sparsify.layers.weight_layout import undo_layouts

#: Classes that modules of torch get in an exported model; each is a subclass of torch's, and has `replaces`.
FASTER_KINDS = (DepthwiseConv2d, MaxPool2d)
#: The attribute of a module with its plan.
_PLAN = "_fused_plan"


@dataclass(frozen=True)
class Slot:
    """The place of a value among those of a run."""

    number: int


@dataclass(frozen=True, eq=False)
class Call:
    """A step as in the code: a module or function with its arguments, of which some are Slots."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, values: list[Any]) -> Any:
        """Call the function on these values."""
        kwargs = {name: _filled(value, values) for name, value in self.kwargs.items()} if self.kwargs else {}
        return self.function(*[_filled(value, values) for value in self.args], **kwargs)


@dataclass(frozen=True)
class Method:
    """A method of a tensor as a function."""

    name: str

    def __call__(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the method of a tensor."""
        return getattr(tensor, self.name)(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class FusedCall:
    """A step that is a convolution and what follows it: a BatchNorm, a sum, an activation, a MaxPool2d, or fewer.

    input, residual: Slots of what is convolved and of what is added. activation: the kernels' name. The images of a
    pool have their channels last meanwhile, for which torch's pool takes a tenth of the time.
    """

    layer: CSRConvolution | DepthwiseConv2d
    norm: nn.Module | None
    activation: str
    input: int
    residual: int | None
    pool: nn.Module | None = None

    @property
    def followed_by(self) -> str:
        """The operations computed together with the layer, in words."""
        parts = ("batch_norm" if self.norm is not None else "", "sum" if self.residual is not None else "")
        return ", ".join(filter(None, (*parts, self.activation.replace("none", ""))))

    def run(self, values: list[Any]) -> Any:
        """Call the kernel if it takes these values, else the modules one after the other."""
        x, residual = values[self.input], None if self.residual is None else values[self.residual]
        norm = None if self.norm is None else _norm_of(self.norm)
        if norm is not None or self.norm is None:
            y = self.layer.convolve_fused(x, norm, residual, self.activation, channels_last=self.pool is not None)
            if y is not None:
                return y if self.pool is None else _in_layout_of(x, self.pool(y))
        return self.run_apart(x, residual)

    def run_apart(self, x: Any, residual: Any) -> Any:
        """Call the modules one after the other."""
        y = self.layer(x) if self.norm is None else self.norm(self.layer(x))
        y = ACTIVATIONS[self.activation](y if residual is None else y + residual)
        return y if self.pool is None else self.pool(y)


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps of a module's forward for one tensor, and what they were read from.

    steps: each with the Slots that are not needed after it; the value of step i has Slot i + 1, the input Slot 0.
    children, settings: the module's children and plain attributes that its code reads. left_out: modules whose calls
    are part of a FusedCall, with their types and, of an activation, settings.
    """

    steps: tuple[tuple[Call | FusedCall, tuple[int, ...]], ...]
    result: int
    children: tuple[tuple[str, nn.Module | None], ...]
    settings: tuple[tuple[str, Any], ...]
    left_out: tuple[tuple[nn.Module, type[nn.Module], tuple[tuple[str, Any], ...]], ...]

    def applies(self, module: nn.Module, x: Any) -> bool:
        """Return whether the steps do for x what the module's code does, with nobody to notice a difference."""
        if type(x) is not Tensor or not x.is_cpu or not in_plain_inference():
            return False
        own, modules = module.__dict__, module._modules
        if any(modules.get(name) is not child for name, child in self.children):
            return False
        if _differ(own, self.settings):
            return False
        return not any(
            type(left_out) is not kind
            or left_out._forward_hooks
            or left_out._forward_pre_hooks
            or "forward" in left_out.__dict__
            or _differ(left_out.__dict__, settings)
            for left_out, kind, settings in self.left_out
        )

    def run(self, x: Tensor) -> Any:
        """Run the steps."""
        values: list[Any] = [None] * (len(self.steps) + 1)
        values[0] = x
        for number, (step, done) in enumerate(self.steps, 1):
            values[number] = step.run(values)
            for slot in done:
                values[slot] = None
        return values[self.result]


class FusedBlock(nn.Module):
    """The mixin of modules with a plan. Their classes are made at run time, from the plain class."""

    plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class; the class itself is in no module."""
        return _bare, (self.plain,), self.__getstate__()  # type: ignore[no-untyped-call]


def fused_calls(model: nn.Module) -> Iterator[FusedCall]:
    """Yield the fused calls of a model's plans."""
    for module in model.modules():
        if isinstance(module, FusedBlock):
            yield from (step for step, _ in module.__dict__[_PLAN].steps if isinstance(step, FusedCall))


def may_fuse(module: nn.Module) -> bool:
    """Return whether a module may get a plan: no way to be copied of its class's own, no forward of the instance's."""
    kind = type(module)
    is_plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    return is_plain and "forward" not in module.__dict__


def fuse_block(module: nn.Module, plan: Plan) -> None:
    """Let a module follow a plan, in place."""
    module.__dict__[_PLAN] = plan
    module.__class__ = _fused_class(type(module))  # type: ignore[arg-type]


def unfuse(model: nn.Module) -> None:
    """Undo fusions and layouts of weights in place: modules run their own code, layers give plain outputs."""
    undo_layouts(model)
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.__dict__.pop(_PLAN, None)
            module.__class__ = module.plain  # type: ignore[assignment]
        elif type(module) in FASTER_KINDS:
            module.__dict__.pop("followed_by", None)
            module.__class__ = type(module).__base__  # type: ignore[assignment]
    unfuse_activations(model)


def _bare(plain: type[nn.Module]) -> FusedBlock:
    kind: Any = _fused_class(plain)  # type: ignore[arg-type]
    made: FusedBlock = kind.__new__(kind)
    return made


@functools.cache
def _fused_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the class of fused modules of a class; everything but its forward is inherited."""

    @functools.wraps(plain.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__.get(_PLAN)
        if plan is not None and len(args) == 1 and not kwargs and plan.applies(self, args[0]):
            return plan.run(args[0])
        return plain.forward(self, *args, **kwargs)

    own = {"plain": plain, "forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain)(plain.__name__, (FusedBlock, plain), {**own, "__doc__": plain.__doc__})  # type: ignore[misc, no-any-return]


def _differ(attributes: Mapping[str, Any], settings: tuple[tuple[str, Any], ...]) -> bool:
    """Return whether attributes are no longer what they were when a plan was made."""
    for name, value in settings:
        now = attributes.get(name, attributes)
        if type(now) is not type(value) or now != value:
            return True
    return False


def _in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """Return images y with their channels last if those of x are, else first."""
    return y if is_channels_last(x) else y.contiguous()


def _norm_of(module: nn.Module) -> Norm | None:
    """Return the numbers of a BatchNorm in eval mode; None for one that looks at its inputs."""
    own, parameters = module._buffers, module._parameters
    mean, variance = own["running_mean"], own["running_var"]
    if module.training or mean is None or variance is None:
        return None
    return Norm(mean, variance, parameters["weight"], parameters["bias"], module.__dict__["eps"])


def _filled(value: Any, values: list[Any]) -> Any:
    """Return an argument with the values in the place of Slots."""
    kind = type(value)
    if kind is Slot:
        return values[value.number]
    if kind is tuple or kind is list:
        return kind([_filled(item, values) for item in value])
    if kind is dict:
        return {key: _filled(item, values) for key, item in value.items()}
    if kind is slice:
        return slice(*(_filled(item, values) for item in (value.start, value.stop, value.step)))
    return value

"""The notice about weights that stay dense: in layers that cannot convert, and outside of all convertible layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from sparsify.conversion.converters.base import Converter
from sparsify.conversion.converters.convolution import CONVOLUTIONS
from sparsify.conversion.converters.recurrent import RECURRENT
from sparsify.conversion.converters.table import converter_for
from sparsify.conversion.foreign_masks import peft_adapters
from sparsify.conversion.module_surgery import plain_type
from sparsify.layers import MaskedLayer, PackedLayer, Tied

#: The reason for a depthwise convolution that nobody asked for.
DEPTHWISE = "it is depthwise, with a few weights for each channel; types= takes such layers too"

#: Tables with looked-up rows and no product: nobody expects them to be pruned.
TABLES = (nn.Embedding, nn.EmbeddingBag)


def notice(model: nn.Module, left: Mapping[str, str], uncovered: Collection[str], functional: bool) -> str:
    """Return the notice about weights that stay dense, with their share of the model; "" if there are none.

    left: layers that cannot convert, each with the reason.
    uncovered: modules with weights outside of all convertible layers.
    """
    modules, total = dict(model.named_modules()), max(_n_parameters(model.parameters()), 1)
    sentences = []
    if left:
        share = _n_parameters(p for name in left for p in modules[name].parameters()) / total
        names = [f"{name or '(root)'} ({why})" for name, why in left.items()]
        count = "1 layer stays" if len(left) == 1 else f"{len(left)} layers stay"
        sentences.append(f"{count} dense, {share:.1%} of the parameters: {_first(names)}")
    if uncovered:
        share = _n_parameters(p for name in uncovered for p in own_weights(modules[name])) / total
        by_size = sorted(uncovered, key=lambda name: -_n_parameters(own_weights(modules[name])))
        names = [_called(name, modules) for name in by_size]
        sentences.append(
            f"most weights stay dense, {share:.1%} of the parameters, as no layer that converts has them: "
            + f"{_first(names)}{hint([modules[name] for name in uncovered], functional)}"
            + "; with types= convert takes this as meant"
        )
    return ". ".join(sentences)


def convolutions_notice(model: nn.Module, swap: Mapping[str, Converter]) -> str:
    """Return the notice that a plan takes convolutions by default, with their share of the model; "" if it does not.

    swap: the modules to convert, each with its converter.
    """
    modules, total = dict(model.named_modules()), max(_n_parameters(model.parameters()), 1)
    taken = [modules[name] for name, converter in swap.items() if converter in CONVOLUTIONS]
    if not taken:
        return ""
    share = _n_parameters(p for module in taken for p in own_weights(module)) / total
    kinds = sorted({f"torch.nn.{plain_type(module).__name__}" for module in taken})
    return (
        f"this model is made of convolutions: {len(taken)} of them convert, {share:.1%} of the parameters; "
        f"types=[torch.nn.Linear, {', '.join(kinds)}] says that this is meant, types=torch.nn.Linear leaves them dense"
    )


def uncovered(
    model: nn.Module, taken: Iterable[Tensor], left: Iterable[str], converters: Collection[Converter]
) -> tuple[str, ...]:
    """Return the names of modules with weights outside of all convertible layers, if these are the majority.

    A weight is a Parameter of two or more dimensions, outside of embeddings and adapters. Majority: more weights than
    in `taken`, in `left`, and in all layers of the types of `converters`, chosen or not.
    """
    modules = dict(model.named_modules())
    known = {_memory(weight) for weight in taken}
    known |= {_memory(p) for name in left for p in modules[name].parameters()}
    beside = peft_adapters(model)
    for module in modules.values():
        converter = converter_for(module)
        ours = isinstance(module, (MaskedLayer, PackedLayer, Tied, *TABLES)) or module in beside
        if ours or converter in converters:
            known |= {_memory(p) for p in module.parameters()}
    weights_outside = {
        name: rest
        for name, module in modules.items()
        if (rest := [p for p in own_weights(module) if _memory(p) not in known])
    }
    tables = {_memory(p) for module in modules.values() if isinstance(module, TABLES) for p in module.parameters()}
    weights = (p for module in modules.values() for p in own_weights(module))
    n_known = _n_parameters(p for p in weights if _memory(p) in known - tables)
    n_known += sum(module.shape[0] * module.shape[1] for module in modules.values() if isinstance(module, PackedLayer))
    n_outside = _n_parameters(p for rest in weights_outside.values() for p in rest)
    return tuple(weights_outside) if n_outside > n_known else ()


def own_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own Parameters of two or more dimensions."""
    own = (p for p in module._parameters.values() if p is not None and not isinstance(p, nn.UninitializedParameter))
    return [p for p in own if p.ndim >= 2]


def _called(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return a module's name and type, or those of the parametrized module around it."""
    owner = name.partition(".parametrizations")[0]
    return f"{owner or '(root)'} ({plain_type(modules[owner]).__name__})"


def hint(modules: Collection[nn.Module], functional: bool) -> str:
    """Return the options that would convert some of these modules, as a clause."""
    hints = []
    if kinds := {plain_type(m) for m in modules} & {c.dense for c in (*CONVOLUTIONS, *RECURRENT)}:
        names = ", ".join(sorted(f"torch.nn.{kind.__name__}" for kind in kinds))
        hints.append(f"types=[torch.nn.Linear, {names}] takes such layers")
    own = [module for module in modules if not type(module).__module__.startswith("torch.nn")]
    if not functional and any(p.ndim in (2, 3) for module in own for p in own_weights(module)):
        hints.append("functional=True takes Parameters that a module's own code multiplies")
    return "".join(f"; {text}" for text in hints)


def _first(names: list[str]) -> str:
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def _memory(tensor: Tensor) -> int:
    """Return an identity of the memory behind a tensor, on any device."""
    return int(tensor.untyped_storage()._cdata) if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


def _n_parameters(parameters: Iterable[Tensor]) -> int:
    """Count parameters, each once, without lazy ones of no shape yet."""
    return sum(p.numel() for p in set(parameters) if not isinstance(p, nn.UninitializedParameter))

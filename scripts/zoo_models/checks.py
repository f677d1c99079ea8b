"""Checks of every architecture, step by step: each goes on from the state of the one before it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import sparsify
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.kernels.cpu import library as native
from sparsify.layers import MaskedLayer
from sparsify.layers.functional_module import ReadsOnce
from sparsify.layers.held_weight import CSRHeldWeight
from sparsify.reporting.model_run import Inputs, run
from zoo_models.model import Model

SPARSITY = 0.8

Outputs = list[Tensor]


class Subject:
    """One model on its way through the checks: `dense` as it was built, `sparse` converted, `fast` exported."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder
        torch.manual_seed(0)
        self.dense = model.small().eval()
        self.inputs = model.inputs()
        self.before = outputs(self.dense, self.inputs)
        self.sparse: nn.Module
        self.masked: Outputs
        self.fast: nn.Module
        self.exported: Outputs


def convert(subject: Subject) -> str:
    """Nothing changes: not a bit, or in an attention computed in another way, nothing beyond rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparsify.LeftDenseWarning)
        warnings.simplefilter("ignore", sparsify.DefaultTypesWarning)
        subject.sparse = sparsify.convert(copy.deepcopy(subject.dense), **subject.model.convert)
    after = outputs(subject.sparse, subject.inputs)
    if layers_of_type(subject.dense, nn.MultiheadAttention) and not same(after, subject.before):
        assert_no_less_exact(after, subject.before, subject.dense, subject.inputs)
        return "within rounding"
    assert same(after, subject.before), "an output changed"
    return "bit for bit"


def prune(subject: Subject) -> str:
    """Each layer loses exactly its share, and the outputs notice."""
    sparsify.prune(subject.sparse, SPARSITY)
    for name, layer in layers_of_type(subject.sparse, MaskedLayer).items():
        n_zeros, n_weights = int((layer.weight == 0).sum()), layer.weight.numel()
        assert n_zeros == round(SPARSITY * n_weights), f"{name}: {n_zeros} zeros of {n_weights} weights"
    subject.masked = outputs(subject.sparse, subject.inputs)
    assert not same(subject.masked, subject.before), "no output depends on what was pruned"
    return "exact"


def export(subject: Subject) -> str:
    """The exported model has the masked one's outputs: equal by the reference, no less exact by the kernels.

    LSTMs and experts run product by product then, and are no less exact than all products at once.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparsify.LeftDenseWarning)
        subject.fast = sparsify.export(subject.sparse, format="csr")
    subject.exported = outputs(subject.fast, subject.inputs)
    in_steps = any(isinstance(module, CSRHeldWeight) for module in subject.fast.modules())
    if in_steps:
        assert_no_less_exact(subject.exported, subject.masked, subject.sparse, subject.inputs)
    else:
        assert same(subject.exported, subject.masked), "the reference differs from the masked model"
    if subject.model.continuous and native.available():  # there is no library where no compiler was
        fast = outputs(sparsify.export(subject.sparse, format="panel"), subject.inputs)
        assert_no_less_exact(fast, subject.masked, subject.sparse, subject.inputs)
    return "within rounding" if in_steps else "equal"


def save_and_load(subject: Subject) -> str:
    """A file fills a fresh model of other weights."""
    path = subject.folder / "model.safetensors"
    sparsify.save(subject.fast, path)
    torch.manual_seed(1)
    loaded = sparsify.load(path, (subject.model.fresh or subject.model.small)().eval())
    assert same(outputs(loaded, subject.inputs), subject.exported), "the loaded model differs"
    return "equal"


def train(subject: Subject) -> str:
    """A step of AdamW with weight decay moves every layer, and no masked weight."""
    model = copy.deepcopy(subject.sparse).train()
    layers = layers_of_type(model, MaskedLayer)
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    recipe = sparsify.Recipe.model_validate({"groups": [{"layers": list(layers), "sparsity": SPARSITY}]})
    pruner = sparsify.Pruner(model, recipe, optimizer=optimizer)
    make_inputs = subject.model.train_inputs
    losses = floats(run(model, make_inputs() if make_inputs else subject.inputs))
    generator = torch.Generator().manual_seed(0)
    # random gradients: the sum of a normalized output would depend on nothing
    torch.autograd.backward(losses, [torch.randn(loss.shape, generator=generator) for loss in losses])
    optimizer.step()
    for name, layer in layers.items():
        assert bool((layer.weight[layer.mask] != before[name][layer.mask]).any()), f"{name} did not move"
    moved = [name for name, layer in layers.items() if layer.weight[~layer.mask].any()]
    assert subject.model.bypasses_its_layers or not moved, f"{moved[0]}: a masked weight moved"
    pruner.step()
    assert not any(layer.weight[~layer.mask].any() for layer in layers.values()), "a Pruner left a masked weight"
    return "masks hold with a Pruner" if moved else "masks hold"


def deepcopy(subject: Subject) -> str:
    """Copies compute the same."""
    for model, wanted in ((subject.sparse, subject.masked), (subject.fast, subject.exported)):
        assert same(outputs(copy.deepcopy(model), subject.inputs), wanted), "a copy differs"
    return "equal"


def compile_(subject: Subject) -> str:
    """torch.compile captures the exported model whole if it captures the dense one whole; experts break it in parts."""
    compiled, why_not = _compiled(subject.fast, subject.inputs)
    if compiled is None and layers_of_type(subject.fast, ReadsOnce):
        whole, why_masked_not = _compiled(subject.sparse, subject.inputs)
        assert whole is not None, f"the masked model does not compile: {why_masked_not}"
        parts, why_not = _compiled(subject.fast, subject.inputs, whole=False)
        assert parts is not None, f"the exported model does not compile: {why_not}"
        assert_no_less_exact(parts, subject.masked, subject.sparse, subject.inputs)
        return "in parts"
    if compiled is None:
        _, why_dense_not = _compiled(subject.dense, subject.inputs)
        assert why_dense_not, f"the dense model compiles, the exported one does not: {why_not}"
        return f"nor does the dense model: {why_dense_not}"
    if not same(compiled, subject.masked):  # torch.compile takes another path through attention
        assert_no_less_exact(compiled, subject.masked, subject.sparse, subject.inputs)
    return "yes"


CHECKS: dict[str, Callable[[Subject], str]] = {
    "convert": convert,
    "prune": prune,
    "export": export,
    "save, load": save_and_load,
    "train": train,
    "deepcopy": deepcopy,
    "compile": compile_,
}


def outputs(model: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Return the floating-point tensors of a model's answer."""
    with torch.no_grad():
        return floats(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


def floats(output: Any) -> Outputs:
    """Return the floating-point tensors in an output of any structure. Raises AssertionError if there is none."""
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert found, "the model answers with no floating-point tensor"
    return found


def same(ours: Outputs, theirs: Outputs) -> bool:
    """Return whether outputs are equal bit for bit, and finite."""
    assert all(bool(tensor.isfinite().all()) for tensor in ours), "an output is not finite"
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_no_less_exact(ours: Outputs, theirs: Outputs, model: nn.Module, inputs: Inputs) -> None:
    """Hold the root-mean-square error of `ours` against twice the error of `theirs`, the outputs of `model`.

    Both are errors against the model in float64. A kernel of ours is at most twice as far from the truth as torch's, so
    a sum of their errors is too, to first order. If torch makes no error at all, a last place is allowed.
    """
    in_float64 = copy.deepcopy(model).double()
    if hasattr(in_float64, "set_experts_implementation"):  # transformers: the product of all experts is in float32
        in_float64.set_experts_implementation("eager")
    exact = outputs(in_float64, tree_map_only(Tensor, _as_double, inputs))
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        allowed = 2 * _rms(other.double() - truth) + torch.finfo(other.dtype).eps * _rms(truth)
        assert _rms(mine.double() - truth) <= allowed, f"error {_rms(mine.double() - truth):.3g}, allowed {allowed:.3g}"


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _compiled(model: nn.Module, inputs: Inputs, *, whole: bool = True) -> tuple[Outputs | None, str]:
    """Run a model captured in one graph, without a backend's optimizations, or return the reason why it cannot be."""
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo's about the models' own code
            return outputs(torch.compile(model, fullgraph=whole, backend="eager"), inputs), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"

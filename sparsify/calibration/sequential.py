"""Walk through a model in the order in which its layers run, and look at the inputs of each.

The walk stops at every group of layers that get the same input, with that input's Gram matrix over all data. Whoever
walks may change the layers of a stop, and everything behind them sees what they have become. In a chain of blocks
(outline.py) one block runs at a time, on inputs kept from the one before: the walk costs each block one run for each of
its groups, cut short where the group is reached, and one more for its output, in which layers that are finished only
hand out what they have computed before, as far as there is room for it (stand_ins.py). Layers outside of chains cost a
run of the model up to them, in which chains that were walked stand still. A model without chains is one block.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsify.calibration.activation_store import MemoryBudget, SpillingTensorList
from sparsify.calibration.batches import Batch, input_rows, naming_batch, read_batches
from sparsify.calibration.data_parallel import all_reduce_gram, local_batches
from sparsify.calibration.model_trace import (
    NEVER_RAN,
    NO_ROWS,
    ONLY_ZEROS,
    BlockCall,
    ModelTrace,
    TraceRecorder,
    block_of,
    first_tensor,
    split_hidden,
)
from sparsify.calibration.output_cache import OutputCache, override_forward
from sparsify.calibration.padding import Padding, see_padding
from sparsify.layers import MaskedLayer
from sparsify.masking.gram import Gram
from sparsify.masking.unseen import refuse_unseen

T = TypeVar("T")

_REMEDY = "give data that reaches them"


@dataclass(frozen=True)
class CalibratedGroup:
    """A place in the walk: layers that get the very same input, its Gram matrix, and their block in a chain."""

    names: tuple[str, ...]
    gram: Gram
    block: str | None


def calibrate_groups(
    model: nn.Module,
    layers: Collection[str],
    data: Iterable[Any],
    *,
    dense: bool = False,
    cache_bytes: int | None = None,
    choosing: Collection[str] | None = None,
) -> Generator[CalibratedGroup]:
    """Stop at each group of the named layers in execution order.

    Inputs kept between the blocks of a chain take at most `cache_bytes` of memory, and lie in a file beyond that. In a
    process group (torchrun) every process gives the same data, takes its share of the batches, and sees the Gram
    matrices of all of them.

    With `dense`, the Gram matrices in chains also have `cross`: the inputs that the chain's layers had before the walk
    changed any of them, times those they have now.

    The model is in eval mode and keeps no cache (`config.use_cache`) until the walk ends. Raises ValueError, naming
    layer and batch, for data the model does not run on, an input that holds NaN or Inf, and layers that never run. So
    do layers of which the data shows nothing, if they are among the `choosing` ones (None: all), whose weights the
    inputs decide on.
    """
    batches = read_batches(model, data)
    with eval_without_cache(model), contextlib.ExitStack() as shelves:
        choosing = layers if choosing is None else choosing
        trace, padding = _survey(model, layers, batches, choosing)
        walked = set[tuple[str, ...]]()
        batches = local_batches(batches)
        budget = None if cache_bytes is None else MemoryBudget(cache_bytes)
        whole = _ModelReplay(model, trace, padding, choosing, shelves.enter_context(OutputCache(model, budget)))
        for group in trace.groups:
            chain = trace.chain_of(group[0])
            if chain is None:
                yield CalibratedGroup(group, _gram(whole, group, batches, whole.run), None)
                whole.finished.add(trace.ran_once.intersection(group))
            elif chain not in walked:
                walked.add(chain)
                hidden = shelves.enter_context(SpillingTensorList(len(batches), budget))
                before = shelves.enter_context(SpillingTensorList(len(batches), budget)) if dense else None
                yield from _walk_chain(whole, chain, batches, hidden, before)


class _StopForward(BaseException):
    """Ends a run whose rest nobody needs; no `except Exception` in the model's own code stops it."""


class _ModelReplay:
    """The whole model, of which the chains that were walked do not run again.

    Their blocks pass on what they are given, and the last one returns what it has returned for this batch.
    """

    def __init__(
        self, model: nn.Module, trace: ModelTrace, padding: Padding, choosing: Collection[str], finished: OutputCache
    ) -> None:
        self.model, self.trace, self.padding, self.finished = model, trace, padding, finished
        self.choosing = choosing
        self.finals: dict[tuple[str, ...], SpillingTensorList | list[Tensor]] = {}

    def run(self, number: int, batch: Batch) -> None:
        """Run the model on a batch, which is the `number`-th."""
        with contextlib.ExitStack() as stand_ins:
            for chain, finals in self.finals.items():
                for name in chain:
                    forward = self._bypass(name, finals[number] if name == chain[-1] else None)
                    stand_ins.enter_context(override_forward(self.model.get_submodule(name), forward))
            with self.finished.overriding_forwards(number):
                _run(self.model, batch.args, batch.kwargs)

    def arguments(self, chain: tuple[str, ...], number: int, batch: Batch) -> tuple[Tensor, dict[str, BlockCall]]:
        """Return the hidden state that a chain gets, and the other arguments of each of its blocks.

        None of the blocks runs, so their arguments must not depend on a hidden state: `trace_model` has checked that.
        """
        hidden: list[Tensor] = []
        forms: dict[str, BlockCall] = {}

        def overriding_forwards(name: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                found = split_hidden((args, kwargs))
                assert found is not None
                hidden.append(found[0])
                forms[name] = found[1]
                if name == chain[-1]:
                    raise _StopForward
                return self.trace.outputs[name].fill(found[0])

            return forward

        with contextlib.ExitStack() as stand_ins:
            for name in chain:
                stand_ins.enter_context(override_forward(self.model.get_submodule(name), overriding_forwards(name)))
            self.run(number, batch)
        return hidden[0], forms

    def _bypass(self, name: str, final: Tensor | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            found = split_hidden((args, kwargs))
            assert found is not None
            return self.trace.outputs[name].fill(found[0] if final is None else final)

        return forward


def _walk_chain(
    whole: _ModelReplay,
    chain: tuple[str, ...],
    batches: list[Batch],
    hidden: SpillingTensorList,
    dense: SpillingTensorList | None,
) -> Iterator[CalibratedGroup]:
    """Walk through the blocks of a chain, one at a time, on the outputs of the one before, which `hidden` holds.

    `dense` holds what these outputs were without the changes on the way.
    """
    model, trace = whole.model, whole.trace
    forms = []
    for number, batch in enumerate(batches):
        hidden[number], arguments = whole.arguments(chain, number, batch)
        forms.append(arguments)
        if dense is not None:
            dense[number] = hidden[number]
    for name in chain:
        block = model.get_submodule(name)
        groups = [group for group in trace.groups if block_of(group[0], [name]) is not None]

        def run(number: int, batch: Batch, *, last: bool = False, name: str = name, block: nn.Module = block) -> Any:
            with whole.finished.overriding_forwards(number, last=last):
                return _run(block, *forms[number][name].fill(hidden[number]))

        with contextlib.ExitStack() as shelves:
            inputs: dict[str, SpillingTensorList] = {}
            if dense is not None:  # while the block's own layers are still what they were
                ran_once = [group[0] for group in groups if group[0] in trace.ran_once]
                inputs = {
                    first: shelves.enter_context(SpillingTensorList(len(batches), dense.budget)) for first in ran_once
                }
                for number, batch in enumerate(batches):
                    call = forms[number][name].fill(dense[number])
                    dense[number] = _run_noting(whole, block, call, number, batch, inputs)
            for group in groups:
                yield CalibratedGroup(group, _gram(whole, group, batches, run, inputs.get(group[0])), name)
                if group[0] in inputs:
                    inputs[group[0]].close()
                whole.finished.add(trace.ran_once.intersection(group))
        for number, batch in enumerate(batches):
            found = split_hidden(run(number, batch, last=True))
            assert found is not None
            hidden[number] = found[0]
        whole.finished.forget(layer for group in groups for layer in group)
    whole.finals[chain] = hidden


def _gram(
    whole: _ModelReplay,
    group: tuple[str, ...],
    batches: list[Batch],
    run: Callable[[int, Batch], None],
    dense: SpillingTensorList | None = None,
) -> Gram:
    """Add up the Gram matrix of a group's input over all batches; `dense` holds the rows it had at first."""
    layer = whole.model.get_submodule(group[0])
    gram: list[Gram] = []

    def look(number: int, batch: Batch) -> Callable[..., None]:
        n_calls = itertools.count()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = _rows_of(whole, group[0], next(n_calls), args, kwargs, batch)
            if isinstance(layer, MaskedLayer) and rows.shape[1] != layer.shape[1]:
                raise ValueError(
                    f"{group[0]}: a {type(layer).__name__} does not multiply its weight with rows of its input, which "
                    f"calibration needs; leave it dense with exclude=[{group[0]!r}], or prune it without data"
                )
            if not gram:
                gram.append(Gram(rows.shape[1], rows.device))
            try:
                gram[0].add(rows, None if dense is None else _alike(dense[number], rows))
            except ValueError as error:
                raise ValueError(f"{group[0]}: its input in batch {number} of the calibration data {error}") from None
            if group[0] in whole.trace.ran_once:
                raise _StopForward

        return before

    failed: ValueError | None = None
    for number, batch in enumerate(batches):
        hook = layer.register_forward_pre_hook(look(number, batch), with_kwargs=True)
        try:
            run(number, batch)
        except ValueError as error:
            failed = error
            break
        finally:
            hook.remove()
    total = all_reduce_gram(gram[0] if gram else _nothing(layer), failed)
    if not bool(total.sum.diagonal().any()):
        reason = (ONLY_ZEROS if total.n_rows else NO_ROWS) + ", behind the layers that were pruned before"
        refuse_unseen(dict.fromkeys((name for name in group if name in whole.choosing), reason), _REMEDY)
    return total


def _nothing(layer: nn.Module) -> Gram:
    """Return the Gram matrix of a layer that has not run."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return Gram(layer.shape[1] if isinstance(layer, MaskedLayer) else weight.shape[1], weight.device)


def _run_noting(
    whole: _ModelReplay,
    block: nn.Module,
    call: Any,
    number: int,
    batch: Batch,
    inputs: Mapping[str, SpillingTensorList],
) -> Tensor:
    """Run a block, put the rows that its layers get on their shelves, and return its output."""

    def note(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[name][number] = _rows_of(whole, name, 0, args, kwargs, batch)

        return before

    with contextlib.ExitStack() as hooks:
        for name in inputs:
            hook = whole.model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
            hooks.callback(hook.remove)
        found = split_hidden(_run(block, *call))
    assert found is not None
    return found[0]


def _rows_of(
    whole: _ModelReplay, name: str, n_before: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: Batch
) -> Tensor:
    """Return what a layer multiplies its weight with, as (rows, in_features), from the arguments it is called with."""
    layer, tensor = whole.model.get_submodule(name), first_tensor(args, kwargs)
    rows = layer.rows(tensor) if isinstance(layer, MaskedLayer) else tensor
    return input_rows(rows, whole.padding.counts(("input", name), n_before, rows.shape[:-1], batch))


def _alike(dense: Tensor, rows: Tensor) -> Tensor:
    """Return the dense rows; where a router has sent others here since, the rows as they are."""
    return dense if dense.shape == rows.shape else rows


def _survey(
    model: nn.Module, layers: Collection[str], batches: list[Batch], choosing: Collection[str]
) -> tuple[ModelTrace, Padding]:
    """See how the layers run, and how padding lies in their inputs.

    Raises ValueError, naming them all, if there are layers that the data does not reach, or `choosing` ones, in which
    something is to be chosen, of which it shows nothing: no rows, zeros only, or padding only.
    """
    trace, unseen = trace_model(model, layers, batches)
    padding = see_padding(model, batches, [("input", name) for name in layers if unseen.get(name) != NEVER_RAN])
    unseen |= dict.fromkeys(padding.nothing_else(batches), "got nothing but padding of the calibration data")
    refuse_unseen({n: why for n, why in unseen.items() if n in choosing or why == NEVER_RAN}, _REMEDY)
    return trace, padding


def trace_model(model: nn.Module, layers: Collection[str], batches: list[Batch]) -> tuple[ModelTrace, dict[str, str]]:
    """See how the layers run, and name those of which nothing was seen, with the reason.

    Chains count only if standing still changes nothing that the walk looks at.
    """
    recorder = TraceRecorder(model, layers)
    for number, batch in enumerate(batches):
        with naming_batch(number):
            recorder.run(functools.partial(_run, model, batch.args, batch.kwargs))
        if not recorder.unseen:
            break
    trace = recorder.trace()
    if not _bypassing_changes_nothing(model, trace, batches[0]):
        trace = recorder.trace(chains=False)
    return trace, recorder.unseen


def _bypassing_changes_nothing(model: nn.Module, trace: ModelTrace, batch: Batch) -> bool:
    """Say whether a model whose blocks only pass on gives every block and every other layer the arguments it should.

    A skip from the middle of a chain, or an argument made from a hidden state, fails here.
    """
    whole = _ModelReplay(model, trace, Padding({}), (), OutputCache(model, None))
    outside = {group[0] for group in trace.groups if trace.chain_of(group[0]) is None}
    starts, lasts = {chain[0] for chain in trace.chains}, {chain[-1]: chain for chain in trace.chains}
    finals: dict[tuple[str, ...], SpillingTensorList | list[Tensor]] = {}

    def look() -> dict[str, tuple[Tensor | None, BlockCall | None]]:
        found: dict[str, tuple[Tensor | None, BlockCall | None]] = {}

        def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in outside:
                found[name] = first_tensor(args, kwargs), None
            elif (taken := split_hidden((args, kwargs))) is not None:
                found[name] = taken[0] if name in starts else None, taken[1]

        def after(name: str, output: Any) -> None:
            if (taken := split_hidden(output)) is not None:
                finals.setdefault(lasts[name], [taken[0]])

        with contextlib.ExitStack() as hooks:
            for name in (*outside, *(block for chain in trace.chains for block in chain)):
                module = model.get_submodule(name)
                hook = module.register_forward_pre_hook(lambda m, a, k, name=name: before(name, a, k), with_kwargs=True)
                hooks.callback(hook.remove)
                if name in lasts:
                    hooks.callback(module.register_forward_hook(lambda m, a, o, name=name: after(name, o)).remove)
            whole.run(0, batch)
        return found

    real = look()
    whole.finals = finals
    still = look()
    return real.keys() == still.keys() and all(
        (tensor is None or torch.equal(tensor, _present(still[name][0])))
        and (form is None or form.equals(_present(still[name][1])))
        for name, (tensor, form) in real.items()
    )


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run the model, or a part of it, without gradients, up to the end or to where it is enough."""
    with torch.inference_mode(False), torch.no_grad(), contextlib.suppress(_StopForward):
        return module(*args, **kwargs)


@contextlib.contextmanager
def eval_without_cache(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, without the key-value cache of language models, and back."""
    training = [module for module in model.modules() if module.training]
    configs: dict[int, Any] = {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for module in training:
            module.training = True
        for config in caching:
            config.use_cache = True


def _present(value: T | None) -> T:
    assert value is not None
    return value

"""Sequential calibration: the inputs of a model's layers, group by group in execution order.

A group is the layers with the very same input. The caller may change its layers, for example prune them; later groups
then have the inputs that follow from the change. The passes:

1. Trace the model: execution order, groups, chains of blocks (model_trace.py).
2. For each chain, capture the hidden states before its first block and the other arguments of its blocks (replay.py).
3. For each block, and for each group in the block: run the block up to the group, accumulate the Gram matrix of the
   group's input over all batches, and yield the group.
4. With `tune`, call it with the block and its outputs in the dense model.
5. Run the block once more: its outputs are the inputs of the next block.

A block therefore runs once for each of its groups, and once for its output; finished layers repeat stored outputs
while memory for them lasts (output_cache.py). A group outside of chains takes runs of the model up to the group, with
finished chains bypassed. A model without chains is one block.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsify.calibration.activation_store import MemoryBudget, SpillingTensorList
from sparsify.calibration.batches import Batch, input_rows, read_batches
from sparsify.calibration.block_call import BlockCall, first_tensor, hidden_state
from sparsify.calibration.data_parallel import all_reduce_gram, local_batches
from sparsify.calibration.eval_mode import eval_without_cache
from sparsify.calibration.model_trace import NEVER_RAN, NO_ROWS, ONLY_ZEROS, ModelTrace, block_of, trace_model
from sparsify.calibration.output_cache import AttentionCache, OutputCache
from sparsify.calibration.padding import Padding, see_padding
from sparsify.calibration.replay import ModelReplay, StopForward, run_module
from sparsify.calibration.tunable_block import TunableBlock
from sparsify.errors import UnseenExpertsWarning
from sparsify.layers import MaskedLayer
from sparsify.masking.gram import Gram, SampledGram
from sparsify.masking.unseen import named, refuse_unseen

_REMEDY = "give data that reaches them"


@dataclass(frozen=True)
class CalibratedGroup:
    """Layers with the very same input, the Gram matrix of that input, and their block if they are in a chain."""

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
    sampled: Collection[str] = (),
    tune: Callable[[TunableBlock], None] | None = None,
    ready: Callable[[Callable[[str], bool]], None] = lambda test: None,
    resumed: bool = False,
) -> Generator[CalibratedGroup]:
    """Yield each group of the named layers in execution order.

    dense: in chains, the Gram matrices also have `cross`, the inputs before any change times the present ones
    cache_bytes: memory for intermediates between blocks and outputs of finished layers; beyond it, intermediates lie in
        a file (None: all intermediates in memory, and 1 GiB for outputs)
    choosing: layers with a choice of weights to make, decided by the inputs (None: all)
    sampled: layers with no need of products of two features: a group of them has a SampledGram, made faster
    tune: called with each block of a chain after its last group, to change the block's layers once more
    ready: called with a test of layers' names, once those that pass need not be as in the dense model any more: layers
        outside of chains after the trace, those of a block after its run in the dense model
    resumed: other layers were calibrated by an earlier run, so that none of a chain may be left to `tune`

    In a process group (torchrun) every process gives the same data and runs its part of the batches; the Gram matrices
    are those of all batches. The model is in eval mode and without a key-value cache (`config.use_cache`) until the
    generator ends.

    Raises ValueError, naming layer and batch, if the model does not run on the data, an input holds NaN or Inf, a layer
    never runs, or a layer of `choosing` has no evidence in the data.
    """
    _check_rows(model, layers)
    batches = read_batches(model, data)
    with eval_without_cache(model), contextlib.ExitStack() as stores:
        choosing = layers if choosing is None else choosing
        trace, padding = _trace_and_padding(model, layers, batches, choosing, with_outputs=tune is not None)
        if tune is not None and not trace.chains and not resumed:
            raise ValueError(
                "reconstruct tunes the blocks of a chain, and no run of this model shows one; leave it out, and see "
                "sparsify.recover for the model as a whole"
            )
        ready(lambda layer: trace.chain_of(layer) is None)
        batches = local_batches(batches)
        budget = None if cache_bytes is None else MemoryBudget(cache_bytes)
        replay = ModelReplay(model, trace.outputs, batches, stores.enter_context(OutputCache(model, budget)))
        run = _SequentialRun(trace, padding, choosing, sampled, dense, tune, ready, replay, budget, stores)
        begun: set[tuple[str, ...]] = set()
        for group in trace.groups:
            chain = trace.chain_of(group[0])
            if chain is None:
                yield from run.calibrate_in_whole([group])
            elif chain not in begun:
                begun.add(chain)
                yield from run.calibrate_chain(chain)


def _check_rows(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise ValueError, naming the layer, for one whose weight is no factor of rows of its input."""
    for name in layers:
        layer = model.get_submodule(name)
        if isinstance(layer, MaskedLayer) and not layer.multiplies_rows:
            raise ValueError(
                f"{name or '(root)'}: a {type(layer).__name__} does not multiply its weight with rows of its input, "
                f"which calibration needs; leave it dense with exclude=[{name!r}], or prune it without data"
            )


def _trace_and_padding(
    model: nn.Module, layers: Collection[str], batches: list[Batch], choosing: Collection[str], *, with_outputs: bool
) -> tuple[ModelTrace, Padding]:
    """Trace a model, and locate the padding in the inputs of its layers, and in the outputs of blocks if asked for.

    Raises ValueError, with all their names, for layers without a call, and for `choosing` ones without evidence: no
    rows, zeros only, or padding only.
    """
    trace, unseen = trace_model(model, layers, batches)
    places = [("input", name) for name in layers if unseen.get(name) != NEVER_RAN]
    places += [("output", block) for chain in trace.chains for block in chain if with_outputs]
    padding = see_padding(model, batches, places)
    unseen |= dict.fromkeys(padding.nothing_else(batches), "got nothing but padding of the calibration data")
    refuse_unseen({n: reason for n, reason in unseen.items() if n in choosing or reason == NEVER_RAN}, _REMEDY)
    return trace, padding


@dataclass(frozen=True)
class _Block:
    """A block of a chain, with the hidden states and other arguments of its call in each batch."""

    name: str
    module: nn.Module
    groups: Sequence[tuple[str, ...]]
    calls: Sequence[BlockCall]
    hidden: SpillingTensorList
    cache: OutputCache
    attention: AttentionCache

    def run(self, number: int, *, stops: bool = False, last: bool = False) -> Any:
        """Run the block on batch `number`, and return its output.

        stops: the run ends at a layer, with only finished ones before it
        """
        with self.cache.overriding_forwards(number, last=last), self.attention.repeating(number, storing=stops):
            return run_module(self.module, *self.calls[number].fill(self.hidden[number]))


@dataclass(frozen=True)
class _SequentialRun:
    """The passes over the batches of one process: the steps of `calibrate_groups` after the trace."""

    trace: ModelTrace
    padding: Padding
    choosing: Collection[str]
    sampled: Collection[str]
    dense: bool
    tune: Callable[[TunableBlock], None] | None
    ready: Callable[[Callable[[str], bool]], None]
    replay: ModelReplay
    budget: MemoryBudget | None
    stores: contextlib.ExitStack

    def calibrate(
        self,
        group: tuple[str, ...],
        run: Callable[[int], object],
        block: str | None = None,
        dense_rows: SpillingTensorList | None = None,
    ) -> CalibratedGroup:
        """Accumulate the Gram matrix of a group; `run` runs the model or block on the batch of a number.

        `dense_rows` has the rows of the group's input before any change.
        """
        total = _GramSum(self, group, dense_rows)
        failed: ValueError | None = None
        hook = total.layer.register_forward_pre_hook(total, with_kwargs=True)
        try:
            for number in range(len(self.replay.batches)):
                total.begin(number)
                run(number)
        except ValueError as error:
            failed = error  # raised below: other processes wait for the sum
        finally:
            hook.remove()
        gram = all_reduce_gram((total.gram or _empty_gram(total.layer)).finish(), failed)
        if gram.is_empty:
            reason = (ONLY_ZEROS if gram.n_rows else NO_ROWS) + ", behind the layers that were pruned before"
            refuse_unseen(dict.fromkeys((name for name in group if name in self.choosing), reason), _REMEDY)
        elif (unseen := gram.fill_unseen()) and any(name in self.choosing for name in group):
            warnings.warn(
                f"{', '.join(group)}: {len(unseen)} of {gram.n_groups} matrices ({named(map(str, unseen))}) got "
                "no rows of the calibration data, as experts do that no token reached; they lose their smallest "
                f"weights; {_REMEDY} for better ones",
                UnseenExpertsWarning,
                stacklevel=2,
            )
        return CalibratedGroup(group, gram, block)

    def finish(self, group: tuple[str, ...]) -> None:
        """Let the layers of a group, with no more changes to come, repeat their outputs from here on."""
        self.replay.cache.add(self.trace.ran_once.intersection(group))

    def calibrate_chain(self, chain: tuple[str, ...]) -> Iterator[CalibratedGroup]:
        """Calibrate the groups of a chain, one block at a time, on the outputs of the block before.

        With `dense` or `tune`, the blocks also run before any change in them, on dense outputs of the block before. A
        chain that some batch does not reach is calibrated in runs of the whole model.
        """
        hidden = self._new_list(self.stores)
        dense_hidden = self._new_list(self.stores) if self.dense or self.tune is not None else None
        calls: list[dict[str, BlockCall]] = []
        for number in range(len(self.replay.batches)):
            if (arguments := self.replay.chain_arguments(chain, number)) is None:
                self.ready(lambda layer: block_of(layer, chain) is not None)
                yield from self.calibrate_in_whole([g for g in self.trace.groups if block_of(g[0], chain) is not None])
                return
            hidden[number] = arguments[0]
            calls.append(arguments[1])
            if dense_hidden is not None:
                dense_hidden[number] = hidden[number]
        for name in chain:
            groups = [group for group in self.trace.groups if block_of(group[0], [name]) is not None]
            module = self.replay.model.get_submodule(name)
            cache, attention = self.replay.cache, AttentionCache(self.replay.cache.budget)
            block = _Block(name, module, groups, [call[name] for call in calls], hidden, cache, attention)
            yield from self._calibrate_block(block, dense_hidden)
            for number in range(len(self.replay.batches)):
                hidden[number] = hidden_state(block.run(number, last=True))
            cache.forget(layer for group in groups for layer in group)
            attention.forget()
        self.replay.finals[chain] = hidden

    def calibrate_in_whole(self, groups: Iterable[tuple[str, ...]]) -> Iterator[CalibratedGroup]:
        """Calibrate groups, in their order, in runs of the whole model."""
        for group in groups:
            yield self.calibrate(group, self.replay.run)
            self.finish(group)

    def _calibrate_block(self, block: _Block, dense_hidden: SpillingTensorList | None) -> Iterator[CalibratedGroup]:
        with contextlib.ExitStack() as stores:
            dense_rows = {} if dense_hidden is None else self._dense_rows(block, dense_hidden, stores)
            self.ready(lambda layer: block_of(layer, [block.name]) is not None)
            for group in block.groups:
                rows = dense_rows.get(group[0])
                run = functools.partial(block.run, stops=group[0] in self.trace.ran_once)
                yield self.calibrate(group, run, block.name, rows)
                if rows is not None:
                    rows.close()
                self.finish(group)
        if self.tune is not None and dense_hidden is not None and block.groups:
            self.tune(self._tunable(block, dense_hidden))

    def _tunable(self, block: _Block, targets: SpillingTensorList) -> TunableBlock:
        """Return a block for tuning; from here on its layers repeat no stored outputs."""
        names = tuple(name for group in block.groups for name in group)
        self.replay.cache.forget(names)
        block.attention.forget()

        def counts(number: int, lead: Sequence[int]) -> Tensor | None:
            return self.padding.counts(("output", block.name), 0, lead, self.replay.batches[number])

        return TunableBlock(block.name, block.module, names, block.calls, block.hidden, targets, counts)

    def _dense_rows(
        self, block: _Block, hidden: SpillingTensorList, stores: contextlib.ExitStack
    ) -> dict[str, SpillingTensorList]:
        """Run a block before any change in it, and return the rows of its groups' inputs, by first layer.

        `hidden` has the block's hidden states in the dense model, and then its outputs. A layer with several calls has
        no rows here, and no layer has any without `dense`.
        """
        firsts = [group[0] for group in block.groups if self.dense and group[0] in self.trace.ran_once]
        dense_rows = {name: self._new_list(stores) for name in firsts}
        for number, call in enumerate(block.calls):
            with contextlib.ExitStack() as hooks:
                for name, rows in dense_rows.items():
                    hook = functools.partial(self._store_rows, rows, name, number)
                    layer = self.replay.model.get_submodule(name)
                    hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
                output = run_module(block.module, *call.fill(hidden[number]))
            hidden[number] = hidden_state(output)
        return dense_rows

    def _store_rows(
        self,
        store: SpillingTensorList,
        name: str,
        number: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        store[number] = self.rows(name, number, 0, args, kwargs)

    def rows(self, name: str, number: int, n_before: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the rows (rows, in_features) that a layer multiplies its weight with, without padding.

        args and kwargs are those of its call after `n_before` others in batch `number`. With groups, rows are
        (rows, input_groups, in_features).
        """
        layer, tensor = self.replay.model.get_submodule(name), first_tensor(args, kwargs)
        rows = layer.rows(tensor) if isinstance(layer, MaskedLayer) else tensor
        n_last = 2 if isinstance(layer, MaskedLayer) and _rows_of_groups(layer, args) else 1
        if isinstance(layer, MaskedLayer) and layer.group_of_call(args) is not None:
            return input_rows(rows, None)  # the rows of an expert are no tokens in order
        counts = self.padding.counts(("input", name), n_before, rows.shape[:-n_last], self.replay.batches[number])
        return input_rows(rows, counts, n_last)

    def row_parts(
        self, name: str, number: int, n_before: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[Tensor]:
        """Yield the same rows in parts of bounded memory; in one where padding is left out."""
        layer = self.replay.model.get_submodule(name)
        if not isinstance(layer, MaskedLayer) or self.padding.layouts.get(("input", name)):
            yield self.rows(name, number, n_before, args, kwargs)
            return
        for part in layer.row_parts(first_tensor(args, kwargs)):
            yield input_rows(part, None, 2 if _rows_of_groups(layer, args) else 1)

    def _new_list(self, stores: contextlib.ExitStack) -> SpillingTensorList:
        return stores.enter_context(SpillingTensorList(len(self.replay.batches), self.budget))


class _GramSum:
    """The Gram matrix of a group's input: a forward pre-hook of its first layer that adds the rows of each call.

    `gram` is None before the first call.
    """

    def __init__(self, run: _SequentialRun, group: tuple[str, ...], dense_rows: SpillingTensorList | None) -> None:
        self.run, self.name, self.dense_rows = run, group[0], dense_rows
        self.layer = run.replay.model.get_submodule(group[0])
        self.sampled = all(name in run.sampled for name in group)
        self.gram: Gram | None = None

    def begin(self, number: int) -> None:
        """Begin with batch `number`."""
        self.number, self.n_calls = number, 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows_of = self.run.row_parts if self.dense_rows is None else self._whole
        for rows in rows_of(self.name, self.number, self.n_calls, args, kwargs):
            self._add(rows, self.layer.group_of_call(args) if isinstance(self.layer, MaskedLayer) else None)
        self.n_calls += 1
        if self.name in self.run.trace.ran_once:
            raise StopForward

    def _whole(self, *call: Any) -> Iterator[Tensor]:
        """Yield all rows of a call at once, as those of the dense model are stored."""
        yield self.run.rows(*call)

    def _add(self, rows: Tensor, group: int | None) -> None:
        """Add some rows of a call; group: the only group of outputs with these rows."""
        n_groups = self.layer.input_groups if isinstance(self.layer, MaskedLayer) else 1
        if isinstance(self.layer, MaskedLayer) and rows.shape[-1] != self.layer.shape[1]:
            raise ValueError(
                f"{self.name}: a {type(self.layer).__name__} does not multiply its weight with rows of its input, "
                f"which calibration needs; leave it dense with exclude=[{self.name!r}], or prune it without data"
            )
        if self.gram is None:
            sampled = self.sampled and n_groups == 1
            self.gram = (
                SampledGram(rows.shape[-1], rows.device) if sampled else Gram(rows.shape[-1], rows.device, n_groups)
            )
        dense = None if self.dense_rows is None else self.dense_rows[self.number]
        if dense is not None and dense.shape != rows.shape:
            dense = rows  # a router has sent other rows here since
        try:
            self.gram.add(rows, dense, group)
        except ValueError as error:
            reason = f"its input in batch {self.number} of the calibration data {error}"
            raise ValueError(f"{self.name}: {reason}") from None


def _rows_of_groups(layer: MaskedLayer, args: tuple[Any, ...]) -> bool:
    """Return whether the rows of a call have a dimension for the groups of outputs."""
    return layer.input_groups > 1 and layer.group_of_call(args) is None


def _empty_gram(layer: nn.Module) -> Gram:
    """Return the Gram matrix of a layer without a call."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, MaskedLayer):
        return Gram(layer.shape[1], weight.device, layer.input_groups)
    return Gram(weight.shape[1], weight.device)

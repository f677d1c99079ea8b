"""The model trace: execution order of layers, layers with the very same input, and chains of blocks.

All of it is seen in runs of the model, not read from names. A *chain* is a sequence of blocks, children of one
nn.ModuleList or nn.Sequential. Each of them runs once and gets the output of the block before. Such blocks can run one
at a time on stored inputs, with only one of them at work and, in a large model, in memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.batches import Batch, naming_batch
from sparsify.calibration.block_call import BlockCall, first_tensor, hidden_state, split_hidden, split_output
from sparsify.calibration.output_cache import OutputCache
from sparsify.calibration.replay import ModelReplay, run_module
from sparsify.layer_names import join
from sparsify.layers import MaskedLayer

#: Reasons for a layer without evidence.
NEVER_RAN = "never ran on the calibration data"
NO_ROWS = "got no rows of the calibration data"
ONLY_ZEROS = "got nothing but zeros from the calibration data"


@dataclass(frozen=True)
class ModelTrace:
    """Groups of layers with one input, in execution order; chains of blocks; the blocks' outputs.

    `ran_once` names the layers with one call: to see the input of such a layer, a run can end there. `outputs` has the
    output of each block of a chain, without the hidden state.
    """

    groups: tuple[tuple[str, ...], ...]
    ran_once: frozenset[str]
    chains: tuple[tuple[str, ...], ...]
    outputs: Mapping[str, BlockCall]

    def chain_of(self, layer: str) -> tuple[str, ...] | None:
        """Return the chain of a layer, None outside of all."""
        return _chain_of(layer, self.chains)


def trace_model(model: nn.Module, layers: Collection[str], batches: list[Batch]) -> tuple[ModelTrace, dict[str, str]]:
    """Run a model, and return its trace; also the layers without evidence, each with the reason.

    A trace has chains only if calibration sees the same inputs when their blocks are bypassed.
    """
    recorder = TraceRecorder(model, layers)
    for number, batch in enumerate(batches):
        with naming_batch(number):
            recorder.run(functools.partial(run_module, model, batch.args, batch.kwargs))
        if not recorder.unseen:
            break
    trace = recorder.trace(recorder.chains())
    if not _bypassing_changes_nothing(model, trace, batches[0]):
        trace = recorder.trace(())
    return trace, recorder.unseen


class TraceRecorder:
    """The events of a model's runs, as far as its trace needs them. Of the tensors, only the latest are kept.

    `unseen` has the layers without evidence so far, each with the reason.
    """

    def __init__(self, model: nn.Module, layers: Collection[str]) -> None:
        self.model, self.layers = model, layers
        self.sequences = [names for names in _sequences(model) if any(block_of(name, names) for name in layers)]
        self.n_calls = dict.fromkeys(layers, 0)
        self.unseen = dict.fromkeys(layers, NEVER_RAN)
        self.groups: list[list[str]] = []
        self.outputs: dict[str, list[BlockCall | None]] = {}  # one entry per call; None for one with a side effect
        self.links: set[tuple[str, str]] = set()
        self._input: tuple[Tensor, tuple[Any, ...]] | None = None  # of the last group, with the key of its rows
        self._hidden: dict[int, tuple[str, Tensor]] = {}  # by sequence, its last block so far and the block's output
        self._versions: dict[str, int] = {}

    def run(self, call: Callable[[], object]) -> None:
        """Run the model under hooks. Chains come from the first run; later runs add layers without a call before."""
        with contextlib.ExitStack() as hooks:
            for name in self.layers:
                hook = functools.partial(self._before_layer, name)
                hooks.callback(self.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
            for number, names in enumerate([] if any(self.n_calls.values()) else self.sequences):
                for name in names:
                    block = self.model.get_submodule(name)
                    before = functools.partial(self._before_block, number, name)
                    after = functools.partial(self._after_block, number, name)
                    hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                    hooks.callback(block.register_forward_hook(after, with_kwargs=True).remove)
            call()
        self._input, self._hidden = None, {}

    def chains(self) -> list[tuple[str, ...]]:
        """Return the chains of the runs so far; a sequence inside a block of a chain gives none of its own."""
        chains: list[tuple[str, ...]] = []
        for names in self.sequences:  # outer ones first
            if _chain_of(names[0], chains) is None:
                chains += self._chains_in(names)
        return chains

    def trace(self, chains: Sequence[tuple[str, ...]]) -> ModelTrace:
        """Return the trace with these chains; without chains the whole model counts as one block."""
        blocks = [name for chain in chains for name in chain]
        groups: list[list[str]] = []
        for names in self.groups:
            groups.append([names[0]])
            for before, name in itertools.pairwise(names):
                same_block = block_of(before, blocks) == block_of(name, blocks)
                if same_block and self.n_calls[before] == self.n_calls[name] == 1:
                    groups[-1].append(name)
                else:
                    groups.append([name])
        outputs = {name: output for name in blocks if (output := self.outputs[name][0])}
        ran_once = frozenset(name for name, n in self.n_calls.items() if n == 1 and not self._several_calls(name))
        return ModelTrace(tuple(map(tuple, groups)), ran_once, tuple(chains), outputs)

    def _several_calls(self, name: str) -> bool:
        """Return whether other runs may call a layer more or less often."""
        layer = self.model.get_submodule(name)
        return isinstance(layer, MaskedLayer) and layer.several_calls

    def _before_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = first_tensor(args, kwargs)
        self.n_calls[name] += 1
        if name in self.unseen:
            self._update_unseen(name, tensor)
        if self.n_calls[name] > 1:
            return
        key = _version(tensor), module.rows_key if isinstance(module, MaskedLayer) else ()
        if self._input is not None and self._input[0] is tensor and self._input[1] == key:
            self.groups[-1].append(name)
        else:
            self.groups.append([name])
        self._input = tensor, key

    def _update_unseen(self, name: str, tensor: Tensor) -> None:
        """Remove a layer from the unseen ones if its input is evidence, else update the reason."""
        if bool(tensor.count_nonzero()):
            del self.unseen[name]
        elif self.unseen[name] != ONLY_ZEROS:
            self.unseen[name] = ONLY_ZEROS if tensor.numel() else NO_ROWS

    def _before_block(
        self, sequence: int, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if (parts := split_hidden((args, kwargs))) is not None:
            self._versions[name] = _version(parts[0])
            if sequence in self._hidden and self._hidden[sequence][1] is parts[0]:
                self.links.add((self._hidden[sequence][0], name))

    def _after_block(
        self, sequence: int, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        call, returned = split_hidden((args, kwargs)), split_output(output)
        wrote = call is None or _version(call[0]) != self._versions.get(name)  # into its own input
        self.outputs.setdefault(name, []).append(None if returned is None or wrote else returned[1])
        if returned is not None:
            self._hidden[sequence] = name, returned[0]

    def _chains_in(self, sequence: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Cut a sequence into runs of linked blocks, and return those with layers."""
        chains: list[list[str]] = []
        for name in sequence:
            calls = self.outputs.get(name, [])
            if len(calls) != 1 or calls[0] is None:
                continue
            if chains and (chains[-1][-1], name) in self.links:
                chains[-1].append(name)
            else:
                chains.append([name])
        ran = [name for name, n in self.n_calls.items() if n]
        return [tuple(c) for c in chains if len(c) > 1 and any(block_of(name, c) is not None for name in ran)]


def _bypassing_changes_nothing(model: nn.Module, trace: ModelTrace, batch: Batch) -> bool:
    """Return whether each block, and each layer outside of chains, gets the same arguments when chains are bypassed.

    A skip from the middle of a chain, or an argument made from a hidden state, fails here.
    """
    replay = ModelReplay(model, trace.outputs, [batch], OutputCache(model, None))
    dense = _Arguments(trace, replay)
    replay.finals = {chain: [dense.finals[chain[-1]]] for chain in trace.chains if chain[-1] in dense.finals}
    return dense.equals(_Arguments(trace, replay))


class _Arguments:
    """The arguments seen in one run: of the blocks of chains, and of the layers outside.

    inputs: of a layer outside of chains its input, of the first block of a chain its hidden state
    calls: of each block the other arguments
    finals: of the last block of a chain its output
    """

    def __init__(self, trace: ModelTrace, replay: ModelReplay) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.calls: dict[str, BlockCall] = {}
        self.finals: dict[str, Tensor] = {}
        self._firsts = {chain[0] for chain in trace.chains}
        outside = {group[0] for group in trace.groups if trace.chain_of(group[0]) is None}
        with contextlib.ExitStack() as hooks:
            for name in outside:
                hook = functools.partial(self._before_layer, name)
                module = replay.model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for name in (block for chain in trace.chains for block in chain):
                hook = functools.partial(self._before_block, name)
                module = replay.model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for chain in trace.chains:
                after = functools.partial(self._after_chain, chain[-1])
                hooks.callback(replay.model.get_submodule(chain[-1]).register_forward_hook(after).remove)
            replay.run(0)

    def equals(self, other: _Arguments) -> bool:
        """Return whether two runs had the same inputs and calls, bit for bit."""
        return (
            self.inputs.keys() == other.inputs.keys()
            and self.calls.keys() == other.calls.keys()
            and all(torch.equal(tensor, other.inputs[name]) for name, tensor in self.inputs.items())
            and all(call.equals(other.calls[name]) for name, call in self.calls.items())
        )

    def _before_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs[name] = first_tensor(args, kwargs)

    def _before_block(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (parts := split_hidden((args, kwargs))) is not None:
            self.calls[name] = parts[1]
            if name in self._firsts:
                self.inputs[name] = parts[0]

    def _after_chain(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if split_hidden(output) is not None:
            self.finals[name] = hidden_state(output)


def block_of(layer: str, blocks: Collection[str]) -> str | None:
    """Return the block of a layer: the layer itself, or a module around it."""
    return next((block for block in blocks if layer == block or layer.startswith(block + ".")), None)


def _chain_of(layer: str, chains: Collection[tuple[str, ...]]) -> tuple[str, ...] | None:
    return next((chain for chain in chains if block_of(layer, chain) is not None), None)


def _sequences(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of the children of every ModuleList and Sequential, outer ones first."""
    return [
        tuple(join(name, child) for child, _ in module.named_children())
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    ]


def _version(tensor: Tensor) -> int:
    """Return the number of writes into a tensor; 0 for one made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version

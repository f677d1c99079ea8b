"""In which order the layers of a model run, which of them get the very same input, and which modules form a chain.

All of it is seen in runs of the model, not read from names. A *chain* is a row of blocks, children of one nn.ModuleList
or nn.Sequential, each of which runs once and gets the output of the one before. Such blocks can be run one at a time on
kept inputs, so that only one of them is at work, and, in a large model, in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

#: Why nothing is known of a layer.
NEVER_RAN = "never ran on the calibration data"
NO_ROWS = "got no rows of the calibration data"
ONLY_ZEROS = "got nothing but zeros from the calibration data"

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class BlockCall:
    """The arguments or the output of a block without the hidden state, the tensor that goes from block to block."""

    leaves: tuple[Any, ...]
    place: int
    structure: TreeSpec

    def fill(self, hidden: Tensor) -> Any:
        """Put a hidden state where it belongs."""
        return tree_unflatten([*self.leaves[: self.place], hidden, *self.leaves[self.place :]], self.structure)

    def equals(self, other: BlockCall) -> bool:
        """Say whether two forms are the same, tensors bit for bit."""
        alike = (self.place, self.structure, len(self.leaves)) == (other.place, other.structure, len(other.leaves))
        return alike and all(_equal(*pair) for pair in zip(self.leaves, other.leaves, strict=True))


def split_hidden(tree: Any) -> tuple[Tensor, BlockCall] | None:
    """Return the first tensor of a tree, and the rest; None if there is none, or more than tensors and plain values.

    A cache, or another object that a block writes into, would be another one when the block runs again.
    """
    leaves, structure = tree_flatten(tree)
    place = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
    if place is None or not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        return None
    return leaves[place], BlockCall((*leaves[:place], *leaves[place + 1 :]), place, structure)


def split_output(output: Any) -> tuple[Tensor, BlockCall] | None:
    """Take apart what a block returned; None if it is more than one tensor, since the next block gets only one."""
    found = split_hidden(output)
    return None if found is None or any(isinstance(leaf, Tensor) for leaf in found[1].leaves) else found


def output_tensor(output: Any) -> Tensor:
    """Return the first tensor that a block or model returned. Raises ValueError if that is none, or one number."""
    found = split_hidden(output)
    if found is None:
        raise ValueError(f"a block or model returned a {type(output).__name__} that begins with no tensor")
    if found[0].dim() == 0:
        raise ValueError("the model returned one number first, as it does with a loss; leave labels out of the data")
    return found[0]


@dataclass(frozen=True)
class ModelTrace:
    """What was seen: groups of layers that share an input, in execution order; chains of blocks; the blocks' outputs.

    `ran_once` names the layers that ran once: a run that only wants their input can stop there.
    """

    groups: tuple[tuple[str, ...], ...]
    ran_once: frozenset[str]
    chains: tuple[tuple[str, ...], ...]
    outputs: Mapping[str, BlockCall]

    def chain_of(self, layer: str) -> tuple[str, ...] | None:
        """Return the chain that a layer is in."""
        return next((chain for chain in self.chains if block_of(layer, chain) is not None), None)


class TraceRecorder:
    """Write down an Outline while the model runs. Of the tensors it sees it keeps only the latest ones."""

    def __init__(self, model: nn.Module, layers: Collection[str]) -> None:
        self.model, self.layers = model, layers
        self.rows = [row for row in _rows(model) if any(block_of(name, row) is not None for name in layers)]
        self.n_calls = dict.fromkeys(layers, 0)
        self.unseen = dict.fromkeys(layers, NEVER_RAN)  # and why, until there is more to see than zeros
        self.groups: list[list[str]] = []
        self.outputs: dict[str, list[BlockCall | None]] = {}  # one entry per call; None where a call cannot be repeated
        self.links: set[tuple[str, str]] = set()
        self._input: tuple[Tensor, int] | None = None  # what the last group got
        self._hidden: dict[int, tuple[str, Tensor]] = {}  # what the last block of each row returned
        self._versions: dict[str, int] = {}

    def run(self, call: Callable[[], object]) -> None:
        """Run the model under hooks. The chains are those of the first run; later ones add layers that had not run."""
        with contextlib.ExitStack() as hooks:
            for name in self.layers:
                layer = self.model.get_submodule(name)
                hooks.callback(layer.register_forward_pre_hook(self._see_layer(name), with_kwargs=True).remove)
            for number, row in enumerate([] if any(self.n_calls.values()) else self.rows):
                for name in row:
                    block = self.model.get_submodule(name)
                    before, after = self._see_block(number, name)
                    hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                    hooks.callback(block.register_forward_hook(after, with_kwargs=True).remove)
            call()
        self._input, self._hidden = None, {}

    def trace(self, *, chains: bool = True) -> ModelTrace:
        """Put together what was seen; without `chains` the whole model counts as one block."""
        found: list[tuple[str, ...]] = []
        for row in self.rows if chains else []:  # a row comes before those inside its blocks
            if not any(block_of(row[0], chain) is not None for chain in found):
                found += self._chains_of(row)
        trace = ModelTrace((), frozenset(), tuple(found), {})
        groups: list[list[str]] = []
        for group in self.groups:
            for i, name in enumerate(group):
                repeated = self.n_calls[name] > 1 or self.n_calls[groups[-1][0] if groups else name] > 1
                chain = trace.chain_of(name)
                same = i > 0 and trace.chain_of(group[i - 1]) == chain
                if same and chain is not None:
                    same = block_of(name, chain) == block_of(group[i - 1], chain)
                if same and not repeated:
                    groups[-1].append(name)
                else:
                    groups.append([name])
        outputs = {name: form for chain in found for name in chain if (form := self.outputs[name][0])}
        ran_once = frozenset(name for name, n in self.n_calls.items() if n == 1)
        return ModelTrace(tuple(map(tuple, groups)), ran_once, tuple(found), outputs)

    def _see_layer(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = first_tensor(args, kwargs)
            self.n_calls[name] += 1
            if name in self.unseen:
                self._weigh(name, tensor)
            if self.n_calls[name] > 1:
                return
            if self._input is not None and self._input[0] is tensor and self._input[1] == _version(tensor):
                self.groups[-1].append(name)
            else:
                self.groups.append([name])
            self._input = tensor, _version(tensor)

        return before

    def _weigh(self, name: str, tensor: Tensor) -> None:
        """Take a layer from the unseen ones, if its input says anything."""
        if bool(tensor.count_nonzero()):
            del self.unseen[name]
        elif self.unseen[name] != ONLY_ZEROS:
            self.unseen[name] = ONLY_ZEROS if tensor.numel() else NO_ROWS

    def _see_block(self, row: int, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (found := split_hidden((args, kwargs))) is not None:
                self._versions[name] = _version(found[0])
                if row in self._hidden and self._hidden[row][1] is found[0]:
                    self.links.add((self._hidden[row][0], name))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given, returned = split_hidden((args, kwargs)), split_output(output)
            wrote = given is None or _version(given[0]) != self._versions.get(name)  # into its own input
            self.outputs.setdefault(name, []).append(None if returned is None or wrote else returned[1])
            if returned is not None:
                self._hidden[row] = name, returned[0]

        return before, after

    def _chains_of(self, row: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Cut a row into runs of linked blocks, and keep those that hold layers."""
        chains: list[list[str]] = []
        for name in row:
            calls = self.outputs.get(name, [])
            if len(calls) != 1 or calls[0] is None:
                continue
            if chains and (chains[-1][-1], name) in self.links:
                chains[-1].append(name)
            else:
                chains.append([name])
        ran = [name for name, n in self.n_calls.items() if n]
        return [tuple(c) for c in chains if len(c) > 1 and any(block_of(name, c) is not None for name in ran)]


def block_of(layer: str, blocks: Collection[str]) -> str | None:
    """Return the block that a layer is, or is in."""
    return next((block for block in blocks if layer == block or layer.startswith(block + ".")), None)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a layer."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _rows(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of the children of every ModuleList and Sequential, outer ones first."""
    return [
        tuple(f"{name}.{child}".lstrip(".") for child, _ in module.named_children())
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    ]


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one is two or torch.equal(one, two)
    return type(one) is type(two) and bool(one == two)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written; one made in inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version

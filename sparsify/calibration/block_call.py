"""The call of a block in two parts: the hidden state, the tensor passed from block to block, and all the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class BlockCall:
    """The arguments or the output of a block without the hidden state: the leaves of a tree, and its structure.

    `index` is the position of the hidden state among the leaves.
    """

    leaves: tuple[Any, ...]
    index: int
    structure: TreeSpec

    def fill(self, hidden: Tensor) -> Any:
        """Return the tree with this hidden state in it."""
        return tree_unflatten([*self.leaves[: self.index], hidden, *self.leaves[self.index :]], self.structure)

    def equals(self, other: BlockCall) -> bool:
        """Return whether two calls are the same, tensors bit for bit."""
        alike = (self.index, self.structure, len(self.leaves)) == (other.index, other.structure, len(other.leaves))
        return alike and all(_equal(*pair) for pair in zip(self.leaves, other.leaves, strict=True))


def split_hidden(tree: Any) -> tuple[Tensor, BlockCall] | None:
    """Return the first tensor of a tree, and the rest; None without a tensor, or with leaves beside plain values.

    A cache, or another object written by a block, would be in another state when the block runs again.
    """
    leaves, structure = tree_flatten(tree)
    index = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
    if index is None or not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        return None
    return leaves[index], BlockCall((*leaves[:index], *leaves[index + 1 :]), index, structure)


def split_output(output: Any) -> tuple[Tensor, BlockCall] | None:
    """Split the output of a block; None for more than one tensor, since the next block gets only one."""
    parts = split_hidden(output)
    return None if parts is None or any(isinstance(leaf, Tensor) for leaf in parts[1].leaves) else parts


def hidden_state(tree: Any) -> Tensor:
    """Return the hidden state of a tree known to have one: the arguments or the output of a block in a chain."""
    parts = split_hidden(tree)
    assert parts is not None
    return parts[0]


def output_tensor(output: Any) -> Tensor:
    """Return the first tensor in the output of a block or model. Raises ValueError if there is none, or one number."""
    parts = split_hidden(output)
    if parts is None:
        raise ValueError(f"a block or model returned a {type(output).__name__} that begins with no tensor")
    if parts[0].dim() == 0:
        raise ValueError("the model returned one number first, as it does with a loss; leave labels out of the data")
    return parts[0]


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a layer: the first tensor among its arguments."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one is two or torch.equal(one, two)
    return type(one) is type(two) and bool(one == two)

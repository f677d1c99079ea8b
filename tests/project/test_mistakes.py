"""Thirty-two mistakes of a user, and the answer to each: the fault, and the way out, before anything is changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from sparsify import compress, convert, export, load, load_recipe, prune, recover, save


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def masked() -> nn.Sequential:
    return prune(convert(net()), 0.5)


def exported() -> nn.Sequential:
    return export(masked(), format="csr")


DATA = [torch.randn(20, 16)]
Folder = Path


def saved(folder: Path) -> Path:
    save(exported(), folder / "small.safetensors")
    return folder / "small.safetensors"


def altered(folder: Path) -> Path:
    file = saved(folder)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return file


def text(folder: Path, content: str, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(content)
    return folder / name


#: The mistake in words, the code with it, and the answer.
MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "prune without convert": (lambda _: prune(net(), 0.5), r"call sparsify.convert\(model\) first"),
    "export without convert": (lambda _: export(net()), r"call sparsify.convert\(model\) and prune it first"),
    "a percentage": (lambda _: prune(masked(), 90), "sparsity must be .*0.*1.*90"),
    "no target": (lambda _: prune(convert(net())), "sparsity"),
    "a misspelt method": (lambda _: prune(masked(), 0.5, method="magnitud"), "magnitud"),
    "a misspelt pattern": (lambda _: prune(masked(), pattern="2;4"), "2;4"),
    "2:4 and another sparsity": (lambda _: prune(masked(), 0.7, pattern="2:4"), "2:4"),
    "a misspelt allocation": (lambda _: prune(masked(), 0.5, allocation="globl"), "globl"),
    "a method on data without data": (lambda _: prune(masked(), 0.5, method="wanda"), "needs .*data"),
    "data without use": (lambda _: prune(masked(), 0.5, data=[]), "data"),
    "empty data": (lambda _: prune(masked(), 0.5, method="wanda", data=[]), "no batch|empty|data"),
    "inputs of another width": (
        lambda _: prune(masked(), 0.5, method="wanda", data=[torch.randn(4, 7)]),
        "batch|shape",
    ),
    "NaN in the data": (
        lambda _: prune(masked(), 0.5, method="wanda", data=[torch.full((4, 16), float("nan"))]),
        "NaN",
    ),
    "one tensor as data": (lambda _: compress(net(), 0.5, data=DATA[0]), r"give the batches in a list: data=\[batch\]"),
    "a layer that is not there": (lambda _: convert(net(), include="encoder.*"), "'encoder.*' matches no layer; near"),
    "every layer left out": (lambda _: convert(net(), exclude="*"), "leave no layer"),
    "a filter with the wrong answer": (
        lambda _: convert(net(), include=lambda n, m: None),
        "must return True or False",
    ),
    "a model without a Linear": (lambda _: convert(nn.Sequential(nn.ReLU())), "no layer that can be converted"),
    "a tied head": (lambda _: convert(_tied()), "tied="),
    "a type that does not convert": (lambda _: convert(net(), types=nn.LayerNorm), "none of the types that convert"),
    "a misspelt form": (lambda _: export(masked(), format="cssr"), "'cssr' is none of"),
    "an example without effect": (lambda _: export(masked(), format="csr", example=DATA[0]), "example has no effect"),
    "no rows": (lambda _: export(masked(), tokens=0), "tokens must be at least 1"),
    "compress twice": (lambda _: compress(exported(), 0.5), "already exported"),
    "a file for another model": (lambda f: load(saved(f), nn.Sequential(nn.Linear(3, 3))), "small.safetensors"),
    "an altered file": (lambda f: load(altered(f), net()), "was altered"),
    "a text as a file": (lambda f: load(text(f, "hello", "a.safetensors"), net()), "a.safetensors"),
    "a misspelt key of a recipe": (
        lambda f: load_recipe(text(f, "groups:\n  - {sparsty: 0.5}\n")),
        r"line 2.*'sparsty'.*did you mean 'sparsity'",
    ),
    "a misspelt recipe": (lambda _: load_recipe("magnitude-60"), "did you mean 'magnitude-50'"),
    "a schedule at once": (
        lambda _: sparsify.apply(masked(), load_recipe("gradual-magnitude-90")),
        "use sparsify.Pruner",
    ),
    "a mask of floats": (lambda _: masked()[0].set_mask(torch.ones(12, 16)), "a mask must be bool"),
    "recover without a budget": (lambda _: recover(masked(), net(), DATA), "steps.*seconds|seconds.*steps|budget"),
}


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight


def _tied() -> nn.Module:
    return _Tied()


def test_there_are_thirty_two() -> None:
    assert len(MISTAKES) == 32


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_answer_names_the_fault_and_the_way_out(mistake: str, tmp_path: Path) -> None:
    code, answer = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError), match=f"(?s){answer}") as found:
        code(tmp_path)
    assert len(str(found.value)) < 700  # to be read

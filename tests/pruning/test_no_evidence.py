"""A layer of which the data shows nothing is named, and nothing is pruned by position."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import Recipe, apply, convert, prune
from sparsify.masking.allocation import MEASURED_ALLOCATIONS
from sparsify.masking.methods.registry import CALIBRATED, METHODS, SOLVERS
from sparsify.pruning.sensitivity import measure_sensitivity

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Four experts, of which the third gets no token, the last is not called, and one gets zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4)) for _ in range(4))
        self.condition = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left = x[:, 0] > 0
        return (
            self.experts[0](x[left]).sum()
            + self.experts[1](x[~left]).sum()
            + self.experts[2](x[:0]).sum()
            + self.condition(torch.zeros_like(x))
        )


MESSAGE = (
    r"^experts\.2\.0, experts\.2\.1: got no rows of the calibration data; "
    r"experts\.3\.0, experts\.3\.1: never ran on the calibration data; "
    r"condition: got nothing but zeros from the calibration data, so that their position alone would choose what is "
    r"removed; give data that reaches them, or leave them dense with exclude=\['experts\.2\.0', 'experts\.2\.1', "
    r"'experts\.3\.0', 'experts\.3\.1', 'condition'\]$"
)

CALLS: dict[str, Any] = {
    **{method: {"method": method} for method in (*METHODS, *CALIBRATED, *SOLVERS)},
    **{allocation: {"method": "wanda", "allocation": allocation} for allocation in MEASURED_ALLOCATIONS},
    "refit": {"refit": True},
    "global": {"method": "wanda", "allocation": "global"},
}


@pytest.mark.parametrize("call", CALLS)
def test_all_such_layers_are_in_one_error_whatever_the_method(call: str) -> None:
    model = convert(Experts())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=MESSAGE):
        prune(model, 0.5, data=[X, X + 1], **CALLS[call])
    with pytest.raises(ValueError, match=MESSAGE):
        apply(model, Recipe(groups=[{"sparsity": 0.5, **CALLS[call]}]), data=[X])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    prune(model, 0.5, data=[X], exclude=["experts.2.*", "experts.3.*", "condition"], **CALLS[call])


def test_so_it_is_where_sensitivity_is_measured() -> None:
    with pytest.raises(ValueError, match=MESSAGE):
        measure_sensitivity(convert(Experts()), [X], sparsities=(0.5,))


def test_later_batches_may_reach_what_the_first_does_not() -> None:
    class Some(Experts):
        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x[: int(x[0, 0])]).sum()

    one = torch.ones(3, 8)
    model = prune(convert(Some(), include="experts.0.*"), 0.5, method="wanda", data=[one * 0, one])
    assert model.experts[0][0].sparsity == 0.5


def test_a_batch_that_is_all_padding() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.b(self.a(self.embed(input_ids)))

    ids = torch.ones(2, 4, dtype=torch.long)
    padding, text = torch.zeros_like(ids), torch.ones_like(ids)
    with pytest.raises(ValueError, match=r"^a, b: got nothing but padding of .* exclude=\['a', 'b'\]"):
        prune(convert(Text()), 0.5, method="wanda", data=[{"input_ids": ids, "attention_mask": padding}])
    both = [{"input_ids": ids, "attention_mask": mask} for mask in (padding, text)]
    assert prune(convert(Text()), 0.5, method="wanda", data=both).a.sparsity == 0.5


@pytest.mark.parametrize("called", [True, False])
def test_a_layer_that_loses_its_tokens_as_others_are_pruned(called: bool) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.expert = nn.Linear(8, 1, bias=False), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            chosen = x[(self.gate(x) > 0)[:, 0]]
            return self.expert(chosen) if called or len(chosen) else x

    model = convert(Gated())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^expert: got no rows of .*, behind the layers that were pruned before"):
        prune(model, allocation={"gate": 1.0, "expert": 0.5}, method="wanda", data=[X])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_where_nothing_is_to_be_chosen_nothing_need_be_seen() -> None:
    net = convert(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)))
    for _ in range(2):  # the second layer gets zeros once the first is gone
        prune(net, 1.0, method="wanda", data=[X])
    prune(net, 0.0, method="wanda", data=[X])
    assert [layer.sparsity for layer in net] == [0.0, 0.0]

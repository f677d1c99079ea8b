"""The quality on other data is compared with that on the calibration data."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CarryOverWarning, carry_over
from sparsify.reporting.carry_over import CarryOver


class Tokens(nn.Module):
    """Rows of tokens through one layer; what the mask hides is noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(x) + torch.randn(*x.shape[:2], 4) * (attention_mask == 0)[..., None]


def test_the_cosine_is_the_mean_over_rows_without_padding() -> None:
    torch.manual_seed(0)
    model = sparsify.convert(Tokens())
    dense = copy.deepcopy(model)
    sparsify.prune(model, 0.5)
    x, mask = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.long)
    mask[:, 2:] = 0
    batch = {"x": x, "attention_mask": mask}
    one, other = (net.layer(x[mask.bool()]).detach().double() for net in (model, dense))
    expected = float(((one * other).sum(1) / one.norm(dim=1) / other.norm(dim=1)).mean())
    found = carry_over(model, dense, [batch], {"same": [batch]})
    assert found.inside == pytest.approx(expected, abs=1e-6)
    assert found.outside == {"same": found.inside}
    assert str(found) == f"calibrated on: {found.inside:.3f}\nsame: {found.inside:.3f}"
    assert model.training


def test_data_that_is_far_worse_is_named() -> None:
    model = sparsify.convert(nn.Sequential(nn.Linear(4, 2, bias=False)))
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 1]]))
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]]))
    good, bad = torch.tensor([[1.0, 1, 1, 0]]), torch.tensor([[0.0, 0, 1, -0.9], [1, 0, 1, 3]])
    with pytest.warns(CarryOverWarning, match=r"of 1\.000 on the calibration data, and of 0\.\d+ on letters; add data"):
        found = carry_over(model, dense, [good], {"letters": [bad], "news": [good]})
    assert found.far_worse == ["letters"]


@pytest.mark.parametrize(("inside", "outside", "worse"), [(0.8, 0.71, []), (0.8, 0.69, ["x"]), (1.0, 0.985, [])])
def test_far_worse_is_one_and_a_half_times_the_distance(inside: float, outside: float, worse: list[str]) -> None:
    found = CarryOver(inside, {"x": outside})
    assert found.far_worse == worse
    if not worse:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.warn()


def test_what_cannot_be_compared_is_an_error() -> None:
    net = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="no other data to compare on"):
        carry_over(net, net, [torch.ones(1, 4)], {})
    with pytest.raises(ValueError, match="the data x is empty"):
        carry_over(net, net, [torch.ones(1, 4)], {"x": iter(())})

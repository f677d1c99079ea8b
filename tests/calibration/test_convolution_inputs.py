"""Convolutions are pruned on their unfolded inputs: as a Linear on the rows, group by group."""

import copy

import pytest
import torch
from torch import nn

import sparsify
from sparsify.calibration.sequential import calibrate_groups
from sparsify.layers import sparse_convolution

pytestmark = pytest.mark.usefixtures("one_thread")

CONVOLUTIONS = [
    nn.Conv1d(3, 6, 3, stride=2, padding=1),
    nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
    nn.Conv2d(4, 6, (3, 1), groups=2, dilation=(2, 1)),
    nn.ConvTranspose2d(2, 4, (2, 3), stride=2, padding=1, groups=2),
]


def images(conv: nn.Module) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    scale = 0.2 + torch.rand(conv.in_channels, *[1] * len(conv.kernel_size), generator=draw)
    return [
        torch.randn(3, conv.in_channels, *[7, 6][: len(conv.kernel_size)], generator=draw) * scale for _ in range(2)
    ]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_it_is_pruned_as_linears_on_its_rows(conv: nn.Module, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_convolution, "_PART_VALUES", 60)  # many parts
    data, groups = images(conv), conv.groups
    layer = sparsify.convert(copy.deepcopy(conv), types=type(conv))
    weights, inputs = layer.weight_matrix.clone().chunk(groups), [layer.rows(x).detach() for x in data]
    inputs = [x if groups > 1 else x.unsqueeze(-2) for x in inputs]
    sparsify.prune(layer, 0.5, method=method, data=data)
    for number, (weight, mine, mask) in enumerate(
        zip(weights, layer.weight_matrix.chunk(groups), layer.matrix(layer.mask).chunk(groups), strict=True)
    ):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        sparsify.prune(sparsify.convert(linear), 0.5, method=method, data=[x[..., number, :] for x in inputs])
        assert torch.equal(mask, linear.mask)
        torch.testing.assert_close(mine, linear.weight.detach())
    assert layer.sparsity == 0.5
    assert layer.pruning_result is not None
    assert 0 < layer.pruning_result.error < 1


def test_layers_with_one_input_and_other_strides_have_gram_matrices_of_their_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.same, self.down = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean() + self.same(x).mean() + self.down(x).mean()

    model, x = sparsify.convert(Block(), types=nn.Conv2d), torch.randn(2, 3, 5, 5)
    found = {group.names: group.gram for group in calibrate_groups(model, ["conv", "same", "down"], [x])}
    assert {names: gram.n_rows for names, gram in found.items()} == {("conv", "same"): 50, ("down",): 18}
    rows = x[:, :, ::2, ::2].movedim(1, -1).reshape(-1, 3).double()
    torch.testing.assert_close(found[("down",)].matrix, rows.T @ rows)


@pytest.mark.parametrize(
    "options", [{"allocation": "error"}, {"allocation": "global", "max_sparsity": 0.8}, {"refit": True}]
)
def test_every_allocation_and_refit_on_a_small_network(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=4)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    data = [torch.randn(4, 4, 6, 6) for _ in range(2)]
    sparsify.prune(
        sparsify.convert(model, types=[nn.Conv2d, nn.Linear]), 0.5, data=data, **{"method": "wanda", **options}
    )
    layers = [model[0], model[2], model[5]]
    assert sum(int((~layer.mask).sum()) for layer in layers) == sum(layer.mask.numel() for layer in layers) // 2


def test_units_over_several_groups_are_refused_by_a_solver() -> None:
    conv = sparsify.convert(nn.Conv2d(4, 8, 1, groups=4), types=nn.Conv2d)
    with pytest.raises(ValueError, match="prunes a layer with groups group by group, and pattern 4x1 has units over"):
        sparsify.prune(conv, 0.5, method="sparsegpt", pattern="4x1", data=[torch.randn(1, 4, 3, 3)])
    sparsify.prune(conv, 0.5, method="wanda", pattern="4x1", data=[torch.randn(1, 4, 3, 3)])

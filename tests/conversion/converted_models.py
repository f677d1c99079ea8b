"""Small models to convert, and a check that a failed call changes nothing."""

import torch
from torch import Tensor, nn


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4, bias=False))


X = torch.linspace(-1, 1, 24).reshape(3, 8)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Return all that must not change when a call fails."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    return {"types": [(name, type(m)) for name, m in model.named_modules()], "tensors": tensors}


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    now = snapshot(model)
    assert now["types"] == before["types"]
    torch.testing.assert_close(now["tensors"], before["tensors"], rtol=0, atol=0, equal_nan=True)


class OwnAttention(nn.MultiheadAttention):
    """A subclass, of which nobody knows what it computes."""


class Attention(nn.Module):
    def __init__(self, kind: type[nn.MultiheadAttention] = OwnAttention) -> None:
        super().__init__()
        self.attention, self.fc = kind(8, 2, batch_first=True), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0])

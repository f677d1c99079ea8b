"""Fixtures for layers whose outputs are deferred: the tests' layers are smaller than those that are worth it."""

import pytest

from sparsify.inference import fusion
from sparsify.kernels import mlp_op
from sparsify.layers import csr_linear, deferred


@pytest.fixture
def small_outputs_count(monkeypatch):
    """Let layers of any size defer their outputs."""
    monkeypatch.setattr(fusion, "FEWEST_FEATURES", 1)
    monkeypatch.setattr(deferred, "FEWEST_OUTPUTS", 1)


@pytest.fixture
def few_tokens_count(monkeypatch):
    """Let two layers be one call for any number of tokens."""
    monkeypatch.setattr(mlp_op, "FEWEST_TOKENS", 1)


@pytest.fixture
def calls(monkeypatch):
    """Return the shapes of the second layers of calls for two, as a list that grows."""
    shapes, mlp = [], mlp_op.mlp

    def spy(*operands):
        y = mlp(*operands)
        if y is not None:
            shapes.append(operands[2].shape)
        return y

    monkeypatch.setattr(csr_linear.mlp_op, "mlp", spy)
    return shapes

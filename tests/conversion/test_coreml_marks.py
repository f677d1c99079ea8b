"""Marks for Core ML: the buffers on a dense model, and the weights in a converted program."""

import copy
import warnings

import pytest
import torch
from torch import nn

import sparsify


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.head = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.up(self.attention(x, x, x, need_weights=False)[0])))


def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = sparsify.convert(Net().eval(), exclude=["head"])
    return sparsify.prune(model, 0.75)


@pytest.mark.parametrize("exported", [False, True])
def test_the_weights_that_had_masks_are_marked(exported: bool) -> None:
    model = sparsify.export(pruned(), format="csr") if exported else pruned()
    plain = sparsify.to_dense(copy.deepcopy(model))
    dense = sparsify.to_dense(model, mark="coreml")
    marks = {name: buffer for name, buffer in dense.named_buffers() if "_COREML_" in name}
    assert {name: buffer.tolist() for name, buffer in marks.items()} == {
        "_COREML_/metadata_version": 1,
        "up._COREML_/weight/compression_type": [1],
        "attention._COREML_/in_proj_weight/compression_type": [1],
        "attention.out_proj._COREML_/weight/compression_type": [1],
    }
    state = dense.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert state.keys() - plain.state_dict().keys() == marks.keys()


def test_a_root_layer_is_marked_and_a_plain_model_is_not() -> None:
    root = sparsify.to_dense(sparsify.prune(sparsify.convert(nn.Linear(8, 4)), 0.5), mark="coreml")
    assert set(dict(root.named_buffers())) == {"_COREML_/weight/compression_type", "_COREML_/metadata_version"}
    assert not list(sparsify.to_dense(nn.Linear(8, 4), mark="coreml").buffers())


def test_an_unknown_mark_changes_nothing() -> None:
    model = pruned()
    with pytest.raises(ValueError, match="mark='tflite' is none of: coreml"):
        sparsify.to_dense(model, mark="tflite")
    assert isinstance(model.up, sparsify.SparseLinear)


def test_coremltools_stores_them_sparse() -> None:
    """Of Linears: coremltools 9 does not take the attention of torch 2.14."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    masked = sparsify.prune(sparsify.convert(plain, exclude=["4"]), 0.75)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ct = pytest.importorskip("coremltools", reason="coremltools is missing: pip install coremltools")
        traced = torch.jit.trace(sparsify.to_dense(masked, mark="coreml"), torch.randn(5, 16))
        program = ct.convert(
            traced,
            inputs=[ct.TensorType(shape=(5, 16))],
            minimum_deployment_target=ct.target.iOS18,
            convert_to="milinternal",
        )
    operators = [operator.op_type for function in program.functions.values() for operator in function.operations]
    assert operators.count("constexpr_sparse_to_dense") == 2, operators

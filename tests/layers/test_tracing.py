"""torch.fx, torchvision's feature extractors and torch.jit on exports, as on the dense models."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparsify
from sparsify.kernels.cpu import library as native

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = ("csr", *(native.FORMS[:1] if native.available() else ()))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.fc(self.encoder(attended)) + 1


class Multiplying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.up)) @ self.down


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, 16))


MODELS = {
    "mlp": (mlp, (2, 5, 16)),
    "attention": (Attending, (2, 5, 16)),
    "Parameters": (Multiplying, (5, 16)),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.SiLU(), nn.Conv2d(6, 4, 1)), (2, 8, 3, 3)),
    "a layer": (lambda: nn.Linear(16, 4), (2, 16)),
    "a convolution": (lambda: nn.Conv2d(8, 4, 1), (2, 8, 3, 3)),
}


def exported(name: str, form: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return the dense model, its export, and an input."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    dense = make().eval()
    options = {"types": nn.Conv2d} if "convolution" in name else {"functional": name == "Parameters"}
    model = sparsify.prune(sparsify.convert(copy.deepcopy(dense), **options), 0.5)
    return dense, sparsify.export(model, format=form), torch.randn(shape)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_fx_traces_an_export(form: str, name: str) -> None:
    dense, fast, x = exported(name, form)
    wanted = fast(x)
    traced = fx.symbolic_trace(fast)
    for one in (traced, copy.deepcopy(traced)):
        torch.testing.assert_close(one(x), wanted)
    if name in ("mlp", "attention", "convolutions"):
        nodes, of_dense = ([(n.op, n.name) for n in fx.symbolic_trace(m).graph.nodes] for m in (fast, dense))
        assert nodes == of_dense
        torch.testing.assert_close(pickle.loads(pickle.dumps(traced))(x), wanted)


def test_a_traced_export_moves_as_the_export_does() -> None:
    _, fast, x = exported("mlp", FORMS[-1])
    traced = fx.symbolic_trace(fast)
    assert {tensor.dtype for tensor in traced.half().parameters()} == {torch.float16}
    torch.testing.assert_close(traced.float()(x), fast(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_torchvision_extracts_features_of_an_export(form: str) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="needs torchvision")
    dense, fast, x = exported("mlp", form)
    names = extraction.get_graph_node_names(dense)
    assert extraction.get_graph_node_names(fast) == names
    extractor = extraction.create_feature_extractor(fast, ["0", "1"])
    wanted = fast[0](x)
    for _ in range(2):
        with torch.no_grad():
            found = extractor(x)
        torch.testing.assert_close(found, {"0": wanted, "1": F.gelu(wanted)})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.(script|trace|trace_method)` is deprecated")
@pytest.mark.parametrize("name", ["mlp", "attention", "convolutions"])
def test_jit_traces_an_export_and_refuses_to_script_it(name: str) -> None:
    _, fast, x = exported(name, FORMS[-1])
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(fast, x)(x), fast(x))
    with pytest.raises(RuntimeError, match=r"cannot be scripted; use torch\.export .*to_dense"):
        torch.jit.script(fast)

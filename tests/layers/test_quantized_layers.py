"""Packed layers with int8 values: copies, files, dtypes, compilers, and the way back."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CSRConv2d, CSRLinear, SparseLinear
from sparsify.kernels import FORMS, quantizes_inputs, supports
from sparsify.kernels.csr import csr_to_dense
from sparsify.kernels.int8 import quantize
from sparsify.layers import SparseConv2d

CPU = torch.device("cpu")
HERE = [form for form in FORMS if supports(form, CPU, torch.float32, quantized=True)]
EXACT = [form for form in HERE if not quantizes_inputs(form)]
X = torch.linspace(-1, 1, 24).reshape(3, 8)

pytestmark = pytest.mark.usefixtures("one_thread")


def masked_layer(bias: bool = True, seed: int = 0) -> SparseLinear:
    torch.manual_seed(seed)
    return SparseLinear(8, 12, 0.5, bias=bias, seed=seed)


def layer(form: str = "csr", **options: bool) -> CSRLinear:
    return CSRLinear.from_sparse(masked_layer(**options).eval(), form=form, quantized=True)


def rounded_weight(masked: SparseLinear) -> Tensor:
    csr, scale = quantize(CSRLinear.from_sparse(masked).csr, 12)
    return csr_to_dense(csr, (12, 8))[0].float() * scale[:, None]


@pytest.mark.parametrize("form", EXACT)
def test_outputs_are_those_of_the_rounded_weight(form: str) -> None:
    masked, packed = masked_layer(), layer(form)
    wanted = nn.functional.linear(X.double(), rounded_weight(masked).double(), masked.bias.double())
    torch.testing.assert_close(packed(X).double(), wanted, rtol=1e-5, atol=1e-6)
    assert packed.values.dtype == torch.int8
    assert packed.float_dtype == torch.float32
    assert packed.n_kept == int(masked.mask.sum())


@pytest.mark.parametrize("form", HERE)
def test_the_weight_is_the_rounded_one_in_every_way_out(form: str) -> None:
    masked, packed = masked_layer(), layer(form)
    wanted = rounded_weight(masked)
    back = packed.to_sparse()
    assert torch.equal(back.masked_weight(), wanted)
    assert torch.equal(back.mask, masked.mask)
    assert back.bias is packed.bias
    assert torch.equal(packed.weight + 0, wanted)
    assert torch.equal(packed.to_csr().to_dense(), wanted)
    dense = sparsify.to_dense(nn.Sequential(copy.deepcopy(packed)))
    assert type(dense[0]) is nn.Linear
    assert torch.equal(dense[0].weight, wanted)
    assert packed.weight.dtype == torch.float32
    assert torch.equal(nn.functional.linear(X, packed.weight, packed.bias), packed(X))


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(module: nn.Module) -> nn.Module:
    fresh = layer(module.form, seed=7)
    assert not torch.equal(fresh(X), module(X))
    fresh.load_state_dict(module.state_dict())
    return fresh


def through_a_float_layer(module: nn.Module) -> nn.Module:
    fresh = CSRLinear.from_sparse(masked_layer(seed=7).eval())
    fresh.wanted_form = module.form
    fresh.load_state_dict(module.state_dict())
    return fresh


def through_meta(module: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    fresh.load_state_dict(module.state_dict())
    return fresh


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_torch_save,
    "state_dict": through_state_dict,
    "float layer": through_a_float_layer,
    "meta": through_meta,
    "dtypes": lambda module: copy.deepcopy(module).double().bfloat16().half().float(),
}


@pytest.mark.parametrize("form", HERE)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_the_same_bits_and_shares_nothing(form: str, way: str) -> None:
    original = layer(form)
    twin = COPIES[way](original)
    before = original(X)
    if way == "dtypes":  # the bias was rounded
        twin.bias = copy.deepcopy(original.bias)
    assert torch.equal(twin(X), before)
    assert (twin.form, twin.own_dtype, twin.weight_scale.dtype) == (form, torch.float32, torch.float32)
    assert torch.equal(twin.values, original.values)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
        twin.weight_scale.zero_()
    assert torch.equal(original(X), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_layer_takes_another_dtype_and_its_values_stay(dtype: torch.dtype) -> None:
    module = layer().to(dtype)
    assert (module.values.dtype, module.weight_scale.dtype, module.float_dtype) == (torch.int8, torch.float32, dtype)
    assert module.weight.dtype == module.bias.dtype == module(X.to(dtype)).dtype == dtype
    wide = nn.functional.linear(X.to(dtype), rounded_weight(masked_layer()).to(dtype), module.bias)
    assert torch.equal(module(X.to(dtype)), wide)
    with pytest.raises(RuntimeError, match="the layer's own dtype is"):
        module(X if dtype != torch.float32 else X.double())
    assert module.to_sparse().weight.dtype == dtype


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", HERE)
def test_an_input_of_another_dtype_or_shape_is_refused(form: str, bias: bool) -> None:
    with pytest.raises(RuntimeError, match="but the input is"):
        layer(form, bias=bias)(X.double())
    with pytest.raises(RuntimeError, match="takes inputs of shape"):
        layer(form, bias=bias)(X[:, :7])


@pytest.mark.parametrize("form", HERE)
def test_the_gradient_reaches_input_and_bias_through_the_rounded_weight(form: str) -> None:
    masked, packed = masked_layer(), copy.deepcopy(layer(form))
    x = X.clone().requires_grad_()
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, rounded_weight(masked).sum(0).expand(3, 8))
    torch.testing.assert_close(packed.bias.grad, torch.full((12,), 3.0))


@pytest.mark.parametrize("form", HERE)
def test_autocast_computes_in_the_layers_own_dtype(form: str) -> None:
    packed = layer(form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed(X)
    assert torch.equal(found, packed(X).bfloat16())


@pytest.mark.parametrize("form", HERE)
def test_compile_and_torch_export(form: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    module = nn.Sequential(layer(form))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for x in (X, torch.cat([X, X]), X[None]):
        assert torch.equal(compiled(x), module(x))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (X,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    assert torch.equal(loaded(X[:2]), module(X[:2]))


@pytest.mark.parametrize("form", HERE)
def test_torch_fx_and_torch_func(form: str) -> None:
    module = nn.Sequential(layer(form), nn.ReLU())
    traced = torch.fx.symbolic_trace(module)
    assert torch.equal(traced(X), module(X))
    jacobian = torch.func.jacrev(module[0])(X[0])
    torch.testing.assert_close(jacobian, rounded_weight(masked_layer()))
    mapped = torch.func.vmap(module[0])(X)
    torch.testing.assert_close(mapped, nn.functional.linear(X, rounded_weight(masked_layer()), module[0].bias))


def test_a_broken_state_dict_is_refused_and_changes_nothing() -> None:
    state, fresh = layer().state_dict(), layer(seed=3)
    before = copy.deepcopy(fresh.state_dict())
    for change, message in (
        ({"weight_scale": torch.full((12,), torch.nan)}, "scales must be finite"),
        ({"weight_scale": torch.ones(11)}, "of shape"),
        ({"values": state["values"].float()}, "belongs to int8"),
        ({"col": state["col"].flip(0)}, "strictly increasing"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fresh.load_state_dict({**state, **change})
    without = {key: value for key, value in state.items() if key != "weight_scale"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight_scale"'):
        fresh.load_state_dict(without)
    for key in ("crow", "col", "values", "weight_scale"):
        assert torch.equal(fresh.state_dict()[key], before[key]), key


def test_a_float_state_makes_a_float_layer_again() -> None:
    wanted = CSRLinear.from_sparse(masked_layer().eval())
    module = layer(seed=4)
    module.load_state_dict(wanted.state_dict())
    assert module.own_dtype is None
    assert "weight_scale" not in module.state_dict()
    assert torch.equal(module(X), wanted(X))


def test_the_representation_says_int8() -> None:
    shown = "CSRLinear(in_features=8, out_features=12, bias=True, sparsity=0.5, values=int8)"
    assert repr(layer()) == shown


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolutions(form: str, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    masked = SparseConv2d(8, 12, 0.5, seed=1)
    packed = CSRConv2d.from_sparse(masked, form=form, quantized=True)
    images = torch.randn(2, 8, 5, 3).to(memory_format=memory_format)
    wanted = nn.functional.conv2d(images, packed.weight, masked.bias)
    found = packed(images)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous(memory_format=memory_format)
    with pytest.raises(RuntimeError, match="the layer's own dtype is"):
        packed(images.double())


PACKED = [form for form in HERE if form != "csr"]


@pytest.mark.parametrize("form", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_16_bits(form: str, dtype: torch.dtype) -> None:
    masked = masked_layer().to(dtype)
    packed = CSRLinear.from_sparse(masked, form=form, quantized=True)
    assert (packed.form, packed.own_dtype, packed.weight.dtype) == (form, dtype, dtype)
    found, wanted = packed(X.to(dtype)).detach(), masked(X.to(dtype)).detach()
    assert found.dtype == dtype
    assert float((found - wanted).float().norm() / wanted.float().norm()) < 0.03


@pytest.mark.parametrize("form", PACKED)
def test_a_changed_index_is_an_error(form: str) -> None:
    module = layer(form)
    module(X)
    module.index.fill_(255)
    for broken in (module, copy.deepcopy(module)):
        for use in (lambda b: b(X), lambda b: b.state_dict(), lambda b: b.weight + 0):
            with pytest.raises(ValueError, match="cannot be read"):
                use(broken)


@pytest.mark.parametrize("form", PACKED)
def test_a_form_comes_back_after_a_dtype_without_kernels(form: str) -> None:
    module = layer(form)
    before, packed = module(X), [tensor.clone() for tensor in module.tensors]
    assert module.double().form == "csr"
    assert module.values.dtype == torch.int8
    assert module.float().form == form
    assert all(map(torch.equal, module.tensors, packed))
    assert torch.equal(module(X), before)


@pytest.mark.parametrize("form", HERE)
def test_an_activation_is_fused(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 256), nn.GELU()).eval()
    model = sparsify.prune(sparsify.convert(model), 0.5)
    fast = sparsify.export(model, format=form, quantize="int8", max_error=1.0)
    x = torch.randn(16, 8)
    assert fast[0].followed_by == "gelu"
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), nn.functional.gelu(fast[0](x)))


@pytest.mark.parametrize("form", HERE)
def test_tied_layers_hold_the_same_tensors(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    sparsify.prune(sparsify.convert(model, tied="share"), 0.5)
    fast = sparsify.export(model, format=form, quantize="int8", max_error=1.0)
    assert all(one is other for one, other in zip(fast[0].tensors, fast[1].tensors, strict=True))
    assert len(fast[1].tensors) == len(FORMS[form]) + 1
    assert torch.equal(fast[1](X), fast[0](X))


@pytest.mark.skipif(not PACKED, reason="the native kernels are missing, or have no form of int8 values")
@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.70), (0.7, 0.50), (0.8, 0.38), (0.9, 0.26)])
def test_bytes_of_a_weight_in_memory(sparsity: float, most: float) -> None:
    model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(768, 768, bias=False))), sparsity)
    rows = [sparsify.report(sparsify.export(model, format=form, quantize="int8"))[0] for form in PACKED]
    assert min(row.n_bytes for row in rows) <= most * 768 * 768

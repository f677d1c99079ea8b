"""An exported layer in each of its forms: the same answers, and the same life as any module."""

import copy
import pickle
import warnings

import pytest
import torch
from tested_kernels import needs_native
from torch import nn

import sparsify
from sparsify import CSRLinear, SparseLinear
from sparsify.kernels import ACTIVATIONS, FORMS, PATTERNED, linear, pack, supports, unpack
from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import CSR, dense_to_csr
from sparsify.kernels.torch_ops import FORM_IDS

pytestmark = needs_native

#: Those whose kernels run on this CPU: of the forms for GPUs none, or all where TRITON_INTERPRET=1 (test_gpu.py).
HERE = [form for form in FORMS if supports(form, torch.device("cpu"), torch.float32)]
HERE = [form for form in HERE if form not in PATTERNED]  # the masks here have no pattern
PACKED = [form for form in HERE if form != "csr"]


def make(form, dtype=torch.float32, sparsity=0.8, shape=(30, 70), bias=True):
    torch.manual_seed(0)
    masked = SparseLinear(shape[1], shape[0], sparsity, bias=bias, seed=0, dtype=dtype)
    return masked, CSRLinear.from_sparse(masked, form=form)


def assert_same(packed, masked, x):
    """Outputs equal up to the rounding of one product in the layer's dtype."""
    with torch.no_grad():
        exact = torch.nn.functional.linear(
            x.double(), masked.masked_weight().double(), None if masked.bias is None else masked.bias.double()
        )
        error = (packed(x).double() - exact).abs().max()
        dense_error = (masked(x).double() - exact).abs().max()
    eps = torch.finfo(x.dtype).eps
    assert error <= 2 * dense_error + 4 * eps * exact.abs().max()


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_a_layer_answers_as_the_masked_one(form, dtype):
    masked, packed = make(form, dtype)
    assert (packed.form, set(packed._buffers)) == (form, {"index", "values"})
    for leading in ((), (1,), (5,), (2, 3), (0,), (2, 0, 3)):
        x = torch.randn(*leading, 70, dtype=dtype)
        assert packed(x).shape == (*leading, 30)
        if x.numel():
            assert_same(packed, masked, x)
    assert_same(packed, masked, torch.randn(70, 9, dtype=dtype).T)  # columns first
    assert_same(packed, masked, torch.randn(9, 140, dtype=dtype)[:, ::2])
    assert_same(packed, masked, torch.randn(4, 9, 75, dtype=dtype)[:, 2:5, 3:73])


@pytest.mark.parametrize("form", PACKED)
def test_a_copy_a_pickle_and_a_state_dict_hold_the_same_weight(form):
    masked, packed = make(form)
    x = torch.randn(4, 70)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert other.form == form
        assert torch.equal(other(x), packed(x))
    state = packed.state_dict()
    assert list(state) == ["bias", "crow", "col", "values"]
    assert torch.equal(state["values"], masked.weight.detach()[masked.mask])
    for other_form in HERE:
        denser = make(other_form, sparsity=0.5)[1]
        denser.load_state_dict(state)
        assert denser.form == other_form
        assert denser.n_kept == packed.n_kept
        assert torch.equal(denser.weight.clone(), packed.weight.clone())
    assert torch.equal(packed.to_csr().to_dense(), masked.masked_weight())


@pytest.mark.parametrize("form", PACKED)
def test_a_bad_state_dict_changes_nothing(form):
    packed = make(form)[1]
    before = packed.weight.clone()
    state = packed.state_dict()
    state["col"] = state["col"].flip(0)
    with pytest.raises(RuntimeError, match="strictly increasing"):
        packed.load_state_dict(state)
    assert torch.equal(packed.weight.clone(), before)
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict({"bias": state["bias"]})


@pytest.mark.parametrize("form", native.FORMS)
def test_where_the_native_kernels_do_not_run_it_becomes_csr_and_back(form):
    masked, packed = make(form)
    before = packed.weight.clone()
    packed.double()
    assert packed.form == "csr"
    assert torch.equal(packed.weight.clone(), before.double())
    packed(torch.randn(2, 70, dtype=torch.float64))
    packed.float()
    assert packed.form == form
    assert_same(packed, masked, torch.randn(4, 70))
    for dtype in native.DTYPES:
        packed.to(dtype)
        assert (packed.form, packed.values.dtype) == (form, dtype)


@pytest.mark.parametrize("form", PACKED)
def test_compile_export_and_autocast(form):
    packed = make(form)[1]
    x = torch.randn(4, 70)
    expected = packed(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(packed, (x,)).module()(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), expected.bfloat16())
        assert torch.equal(packed(x.bfloat16()), packed(x.bfloat16().float()))
    with torch.inference_mode():
        assert torch.equal(packed(x), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.parametrize("form", HERE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [(0, -1), (7, 21)])
def test_the_operator_keeps_torchs_rules_and_has_the_right_gradients(form, activation, rows):
    masked, _ = make(form)
    csr = dense_to_csr(masked.weight.detach(), masked.mask)
    parts, bias = pack(form, csr, (30, 70)), masked.bias.detach().clone().requires_grad_()
    x = torch.randn(6, 70, requires_grad=True)
    result = linear(x, parts, form, (30, 70), bias, activation, rows)
    expected = ACTIVATIONS[activation](masked(x))[:, rows[0] : 30 if rows[1] == -1 else rows[1]]
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(result)
    ours = torch.autograd.grad((result * weights).sum(), (x, bias))
    theirs = torch.autograd.grad((expected * weights).sum(), (x, masked.bias))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    number = list(ACTIVATIONS).index(activation)
    if form == "csr":
        torch.library.opcheck(torch.ops.sparsify.linear_csr, (x, *parts, bias, 30, 70, number, *rows))
    else:
        arguments = (x, *parts, FORM_IDS[form], bias, 30, 70, number, *rows)
        torch.library.opcheck(torch.ops.sparsify.linear_packed, arguments)


@pytest.mark.parametrize("form", HERE)
def test_a_layer_can_give_some_of_its_outputs(form):
    masked, packed = make(form)
    x, shape = torch.randn(2, 3, 70), (2, 3, 14)
    for layer in (masked, packed):
        found, wanted = layer(x, rows=(7, 21)), layer(x)[..., 7:21]
        assert found.shape == shape
        torch.testing.assert_close(found, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x, rows=(7, 21)), packed(x)[..., 7:21])


@pytest.mark.parametrize("form", HERE)
def test_rows_that_a_layer_does_not_have_are_an_error(form):
    packed = make(form)[1]
    for first, end in ((-1, 3), (5, 4), (0, 31), (31, -1)):
        with pytest.raises(RuntimeError, match="the layer has rows 0 to 30, asked for"):
            packed(torch.randn(2, 70), rows=(first, end))
    assert packed(torch.randn(2, 70), rows=(4, 4)).shape == (2, 0)


@pytest.mark.parametrize("form", HERE)
def test_a_tensor_that_does_not_fit_is_an_error(form):
    packed = make(form)[1]
    for x, message in (
        (torch.randn(2, 71), r"takes inputs of shape \(\.\.\., 70\), got \(2, 71\)"),
        (torch.randn(()), "takes inputs of shape"),
        (torch.randn(2, 70, dtype=torch.float64), "values are torch.float32, but the input is torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            packed(x)
    packed.bias = nn.Parameter(torch.zeros(31))
    with pytest.raises(RuntimeError, match=r"the bias must be .* of shape \(30,\)"):
        packed(torch.randn(2, 70))


def test_packing_checks_the_weight_and_the_device():
    csr = dense_to_csr(torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="strictly increasing"):
        pack("panel", CSR(csr.crow, csr.col.flip(0), csr.values), (2, 4))
    with pytest.raises(ValueError, match="it needs the native CPU kernels"):
        pack("panel", csr._replace(values=csr.values.double()), (2, 4))
    with pytest.raises(ValueError, match="'pannel' is none of: csr, panel"):
        supports("pannel", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("form", HERE)
def test_packing_and_unpacking_is_exact_for_any_bits(form):
    values = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), 1e-45, -1.5])
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[0, 0] = mask[0, 6] = mask[2, 3] = mask[4, 0] = mask[4, 1] = mask[4, 5] = True
    weight = torch.zeros(5, 7).masked_scatter(mask, values)
    csr = dense_to_csr(weight, mask)
    back = unpack(form, pack(form, csr, (5, 7)), (5, 7))
    for one, other in zip(csr, back, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_checkpoint_keeps_the_form_and_says_where_it_was_chosen(tmp_path, monkeypatch):
    torch.manual_seed(0)
    times = {True: {"dense": 9.0, "panel": 3.0}, False: {"dense": 5.0, "panel": 6.0}}  # measured again if disturbed
    monkeypatch.setattr(
        "sparsify.inference.form_selection.FormSelector._measure",
        lambda _, candidates, x: times[candidates["dense"].bias is not None],
    )
    model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))), 0.8)
    fast = sparsify.export(model, tokens=32)
    assert [row.format for row in sparsify.report(fast)] == ["panel", "dense"]
    sparsify.save(fast, tmp_path / "model.safetensors")

    def fresh():
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = sparsify.load(tmp_path / "model.safetensors", fresh())
    assert [(r.format, r.reason, r.times_us) for r in sparsify.report(loaded)] == [
        (r.format, r.reason, r.times_us) for r in sparsify.report(fast)
    ]
    x = torch.randn(32, 64)
    assert torch.equal(loaded(x), fast(x))
    monkeypatch.setattr("sparsify.checkpoint.saved_layers.machine_name", lambda _: "another machine")
    with pytest.warns(sparsify.MeasuredElsewhereWarning, match="another machine"):
        sparsify.load(tmp_path / "model.safetensors", fresh())


@pytest.mark.parametrize("form", HERE)
def test_second_derivatives_and_the_meta_device(form):
    masked, packed = make(form)
    x = torch.randn(3, 70, requires_grad=True)

    def second(layer):
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    torch.testing.assert_close(second(packed), second(masked))
    assert packed.to("meta")(torch.randn(3, 70, device="meta")).shape == (3, 30)

"""Exported layers whose index is not one: never loaded, changed, of another device. An error, and never a signal."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear
from sparsify.kernels import gpu, linear
from sparsify.kernels import trust as trust_module
from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import check_csr, dense_to_csr

NATIVE = native.FORMS if native.available() else ()
FORMS = ("csr", *NATIVE)
CANNOT = "the weight of an exported layer cannot be read: .* load it"

pytestmark = pytest.mark.usefixtures("one_thread")


def exported(form: str, **options: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = sparsify.convert(nn.Sequential(nn.Linear(40, 20)).eval(), **options)
    return sparsify.export(sparsify.prune(model, 0.5), format=form)


def index_of(model: nn.Sequential) -> Tensor:
    layer = model[0]
    return layer.col if layer.form == "csr" else layer.index


def scramble(tensor: Tensor) -> None:
    tensor.copy_(torch.randint(0, 256, tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8))


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_was_never_loaded_is_an_error_and_can_be_loaded(form: str, filled: bool) -> None:
    right, x = exported(form), torch.randn(3, 40)
    state = {key: tensor.clone() for key, tensor in right.state_dict().items()}
    empty = copy.deepcopy(right).to("meta").to_empty(device="cpu")
    if filled:  # as memory may well be
        scramble(index_of(empty))
    uses: tuple[Callable[[], object], ...] = (
        lambda: empty(x),
        empty.state_dict,
        lambda: sparsify.to_dense(copy.deepcopy(empty)),
        lambda: empty[0].weight.sum(),
        lambda: empty[0].to_csr(),
    )
    for use in uses:
        with pytest.raises(ValueError, match=CANNOT):
            use()
    assert "CSRLinear" in str(copy.deepcopy(empty))
    assert len(sparsify.report(empty)) == 1
    empty.load_state_dict(state)
    assert torch.equal(empty(x), right(x))


@pytest.mark.parametrize("form", NATIVE)
def test_memory_that_still_holds_an_old_index_counts_as_never_loaded(form: str) -> None:
    empty = exported(form).to("meta").to_empty(device="cpu")
    assert not index_of(empty).any()


@pytest.mark.parametrize("form", NATIVE)
def test_a_weight_without_data_says_so(form: str) -> None:
    with pytest.raises(ValueError, match="is on the meta device and has no data; load it"):
        exported(form).to("meta").state_dict()


def to_shared_memory(model: nn.Sequential) -> None:
    model.share_memory()
    model(torch.zeros(1, 40))
    scramble(index_of(model).data)  # as another process writes: this one's torch does not see it


def replace_data(model: nn.Sequential) -> None:
    index_of(model).data = torch.full_like(index_of(model), 255)


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "in place": lambda model: scramble(index_of(model)),
    "new buffer": lambda model: setattr(
        model[0], "col" if model[0].form == "csr" else "index", torch.full_like(index_of(model), 255)
    ),
    "data": replace_data,
    "resized": lambda model: index_of(model).resize_(7),
    "shared memory": to_shared_memory,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS)
def test_a_change_after_the_first_call_is_noticed(form: str, change: str) -> None:
    model, x = exported(form), torch.randn(3, 40)
    model(x)
    CHANGES[change](model)
    for broken in (model, copy.deepcopy(model)):
        with pytest.raises((ValueError, RuntimeError)):
            broken(x)
        with pytest.raises((ValueError, RuntimeError)):
            broken.state_dict()


@pytest.mark.parametrize("form", FORMS)
def test_shared_memory_that_stays_as_it_was_serves(form: str) -> None:
    model, x = exported(form), torch.randn(3, 40)
    wanted = model(x)
    model.share_memory()
    for _ in range(2):
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("form", NATIVE)
def test_an_index_is_checked_once(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = copy.deepcopy(exported(form)), torch.randn(3, 40)
    checks: list[str] = []
    examine = trust_module._examine
    monkeypatch.setattr(trust_module, "_examine", lambda *args: (checks.append("check"), examine(*args))[0])
    for _ in range(3):
        model(x)
    if form == NATIVE[0]:
        torch.compile(model, backend="aot_eager")(x)
    assert len(checks) == 1
    exported(form)(x)  # what was just packed needs none
    assert len(checks) == 1


def test_indices_that_are_gone_are_forgotten() -> None:
    model, x = exported("csr"), torch.randn(1, 40)
    for _ in range(2 * trust_module._FEWEST):
        copy.deepcopy(model)(x)
    assert len(trust_module._PASSED) <= 2 * trust_module._FEWEST


@pytest.mark.parametrize("form", FORMS)
def test_values_that_do_not_fit_the_index_are_refused(form: str) -> None:
    layer = exported(form)[0]
    for values in (layer.values[:-1].clone(), torch.cat([layer.values, layer.values[:1]])):
        with pytest.raises(ValueError, match=CANNOT):
            linear(torch.randn(2, 40), (*layer.tensors[:-1], values), form, layer.shape)


@pytest.mark.parametrize("form", FORMS)
def test_values_and_bias_with_gaps_are_read_as_they_are(form: str) -> None:
    layer, x = exported(form)[0], torch.randn(2, 40)
    values, bias = (torch.stack([t, t * 0], dim=1)[:, 0].detach() for t in (layer.values, layer.bias))
    assert not values.is_contiguous()
    for given in (bias, torch.ones(1).expand(20)):
        wanted = linear(x, layer.tensors, form, layer.shape, given.clone())
        assert torch.equal(linear(x, (*layer.tensors[:-1], values), form, layer.shape, given), wanted)


@pytest.mark.parametrize("form", NATIVE)
def test_a_state_dict_with_a_wrong_weight_is_refused_and_changes_nothing(form: str) -> None:
    model, x = exported(form), torch.randn(2, 40)
    wanted, state = model(x), model.state_dict()
    state["0.col"] = state["0.col"].clone().fill_(255)
    with pytest.raises(RuntimeError, match="column indices must lie in"):
        model.load_state_dict(state)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("form", ["tiles", "narrow", "blocks"])
def test_no_index_for_gpus_that_check_lets_pass_can_harm(form: str) -> None:
    """Any byte may be changed: `check` refuses, or the index says a weight of this shape."""
    shape = (32, 300) if form == "narrow" else (32, 80)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    if form == "blocks":
        mask = mask[::16, ::16].repeat_interleave(16, 0).repeat_interleave(16, 1)
    csr = dense_to_csr(torch.randn(shape), mask)
    index, values = gpu.pack(form, csr, shape)
    gpu.check(form, index, values.numel(), shape)
    refused = 0
    for position in range(0, index.numel(), 11):
        for flip in (1, 128, 255):
            hostile = index.clone()
            hostile[position] ^= flip
            try:
                gpu.check(form, hostile, values.numel(), shape)
            except ValueError:
                refused += 1
                continue
            check_csr(gpu.unpack(form, hostile, values, shape), shape)
    assert refused > index.numel() // 11
    for bad_index, n_values, bad_shape in (
        (index[:-4], values.numel(), shape),
        (index, values.numel() + 1, shape),
        (index, values.numel(), (48, 80)),
        (index[:2], values.numel(), shape),
        (index.repeat(2)[::2], values.numel(), shape),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            gpu.check(form, bad_index, n_values, bad_shape)


def parts_on_meta(layer: CSRLinear, name: str) -> CSRLinear:
    if name == "bias":
        layer.bias = nn.Parameter(layer.bias.to("meta"))
    else:
        layer._buffers[name] = layer._buffers[name].to("meta")
    return layer


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_another_device_are_refused(form: str) -> None:
    x = torch.randn(2, 40)
    names = ("crow", "col", "values", "bias") if form == "csr" else ("index", "values", "bias")
    for name in names:
        layer = parts_on_meta(exported(form)[0], name)
        for call in (layer, torch.no_grad()(layer), torch.inference_mode()(layer)):
            with pytest.raises(RuntimeError, match=r"the input is on cpu, .* meta"):
                call(x)
    with pytest.raises(RuntimeError, match=r"the input is on meta, .* cpu"):
        exported(form)(x.to("meta"))
    assert exported(form).to("meta")(x.to("meta")).shape == (2, 20)


@pytest.mark.parametrize("form", ["csr", *(["panel"] if NATIVE else [])])
def test_tensors_of_another_device_are_refused_by_a_convolution(form: str) -> None:
    model = sparsify.convert(nn.Sequential(nn.Conv2d(8, 4, 1)), types=nn.Conv2d)
    layer = sparsify.export(sparsify.prune(model, 0.5), format=form)[0]
    layer.bias = nn.Parameter(layer.bias.to("meta"))
    for x in (torch.randn(1, 8, 3, 3), torch.randn(1, 8, 3, 3).contiguous(memory_format=torch.channels_last)):
        with pytest.raises(RuntimeError, match=r"the input is on cpu, .* meta"):
            layer(x)


@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_the_default_device_changes_nothing(form: str) -> None:
    """Device "meta" stands here for a GPU: whatever is made there by mistake has no data."""
    torch.manual_seed(0)
    masked, x = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(40, 20)).eval()), 0.5), torch.randn(3, 40)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.device("meta"):
        fast = sparsify.export(masked, format=form)
        state = fast.state_dict()
        again = sparsify.export(masked, format=form)
        again.load_state_dict(state)
        fast(a).sum().backward()
        half = copy.deepcopy(fast).half().float()
        sparsify.report(fast)
        dense = sparsify.to_dense(copy.deepcopy(fast))
    masked(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    for model in (fast, again, dense):
        torch.testing.assert_close(model(x), masked(x))
    torch.testing.assert_close(half(x), masked(x), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_default_device_changes_no_masks(pattern: str) -> None:
    def pruned() -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 20, device="cpu"), nn.Linear(20, 8, device="cpu"))
        sparsify.convert(model)
        target = None if pattern == "2:4" else 0.5
        sparsify.prune(model, target, pattern=pattern)
        sparsify.prune(model, target, pattern=pattern, method="wanda", data=[torch.ones(4, 40, device="cpu")])
        return torch.cat([layer.mask.flatten() for layer in model])

    wanted = pruned()
    with torch.device("meta"):
        found = pruned()
    assert torch.equal(found, wanted)

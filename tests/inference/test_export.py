"""export: what it packs, what it shares, what it leaves alone, what it refuses. And report, which lists it."""

import copy
import types
from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, PATTERNS
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear, SparseLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 12))
        self.head = nn.Linear(12, 6, bias=False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.scale


def masked(sparsity: float = 0.75, **options: object) -> Net:
    return sparsify.prune(sparsify.convert(Net()), sparsity, **options).eval()


@pytest.mark.parametrize("format", ["auto", "csr", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_those_of_the_masked_model(dtype: torch.dtype, format: str) -> None:
    x = torch.randn(5, 12).to(dtype)
    for sparsity in (0.0, 0.5, 0.9, 1.0):
        model = masked(sparsity).to(dtype)
        found, wanted = sparsify.export(model, format=format)(x), model(x)
        if format == "auto":  # a native kernel adds up in another order
            torch.testing.assert_close(found, wanted)
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_exports(pattern: str) -> None:
    model = sparsify.convert(Net(), include="body.*")
    sparsify.prune(model, None if ":" in pattern else 0.5, pattern=pattern).eval()
    x = torch.randn(5, 12)
    assert torch.equal(sparsify.export(model, format="csr")(x), model(x))


def test_each_format_packs_what_it_says() -> None:
    def types(format: str, sparsity: float) -> set[type]:
        fast = sparsify.export(masked(sparsity), format=format)
        return {type(layer) for layer in (fast.body[0], fast.body[3], fast.head)}

    assert types("csr", 0.0) == {CSRLinear}
    assert types("dense", 0.9) == {nn.Linear}
    assert types("auto", 0.0) == {nn.Linear}  # packed it would take more


def test_auto_never_takes_more_memory_than_dense() -> None:
    for sparsity in (0.0, 0.1, 0.3, 0.9):
        rows = sparsify.report(sparsify.export(masked(sparsity), tokens=1))
        assert len(rows) == 3
        assert all(row.n_bytes <= row.dense_bytes for row in rows)


def test_the_model_stays_as_it_was_and_the_rest_is_shared_if_asked() -> None:
    model = masked().train()
    kinds = {name: type(module) for name, module in model.named_modules()}
    state = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    fast = sparsify.export(model, format="csr", copy=False)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == state[name][0]
        assert torch.equal(tensor, state[name][1])
    assert fast is not model
    assert fast.body[1] is not model.body[1]
    for one, other in ((fast.body[1].weight, model.body[1].weight), (fast.body[0].bias, model.body[0].bias)):
        assert one.data_ptr() == other.data_ptr()
        assert one.requires_grad == other.requires_grad
    assert fast.scale.data_ptr() == model.scale.data_ptr()
    assert fast.training
    assert fast.body[0].training
    fast.eval()
    assert model.training


def memory_of(model: nn.Module) -> set[int]:
    tensors = [t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values())]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}


@pytest.mark.parametrize("format", ["auto", "csr", "dense"])
def test_the_export_owes_nothing_to_the_models_memory(format: str) -> None:
    model, x = masked(), torch.randn(4, 12)
    model.register_buffer("wide", torch.zeros(1).expand(1000))
    fast = sparsify.export(model, format=format)
    assert not memory_of(fast) & memory_of(model)
    assert fast.wide.untyped_storage().nbytes() == 4
    assert all(p.requires_grad for p in fast.parameters())
    wanted = fast(x)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.scale, model.body[1].running_mean):
            tensor.add_(1)
    assert torch.equal(fast(x), wanted)


@pytest.mark.parametrize("format", ["csr", "dense"])
def test_the_export_shares_no_dictionary_with_the_model(format: str) -> None:
    """A hook registered on one later, as calibration does, does not run in the other."""
    model, x = masked(), torch.randn(4, 12)
    model.body[0].notes = {"seen": 0}
    fast = sparsify.export(model, format=format)
    pairs = [(module, fast.get_submodule(name)) for name, module in model.named_modules()]
    shared = {id(value) for one, _ in pairs for value in vars(one).values() if isinstance(value, (dict, list, set))}
    assert not shared & {id(value) for _, other in pairs for value in vars(other).values()}
    ran: list[str] = []
    for module in (model, *model.body, model.head):
        module.register_forward_pre_hook(lambda *_: ran.append("forward pre-hook"))
        module.register_forward_hook(lambda *_: ran.append("forward hook"))
        module.register_full_backward_hook(lambda *_: ran.append("backward hook"))
        module.register_state_dict_pre_hook(lambda *_: ran.append("state_dict pre-hook"))
        module.register_load_state_dict_post_hook(lambda *_: ran.append("load hook"))
    fast(x.requires_grad_()).sum().backward()
    fast.load_state_dict(fast.state_dict())
    assert not ran


class Counting(nn.Sequential):
    """A block that counts what its first layer was called with, by a hook that is a method of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.n_calls = 0
        self[0].register_forward_pre_hook(self.count)

    def count(self, *_: object) -> None:
        self.n_calls += 1


def test_a_hook_that_is_a_method_is_that_of_the_copy() -> None:
    model = sparsify.prune(sparsify.convert(Counting(nn.Linear(8, 4), nn.Tanh())), 0.5)
    fast = sparsify.export(model, format="csr")
    fast(torch.randn(1, 8))
    assert (model.n_calls, fast.n_calls) == (0, 1)


def look(model: nn.Module) -> dict[str, object]:
    """Return what each module is, and how many hooks it has."""
    return {
        name: (type(m), m.training, [len(v) for key, v in vars(m).items() if "_hooks" in key and isinstance(v, dict)])
        for name, m in model.named_modules()
    }


def raising(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["body.1", "body.3", "head"])
def test_a_failure_leaves_the_model_as_it_was(place: str) -> None:
    model = masked().train()
    model.config = types.SimpleNamespace(use_cache=True)
    hook = model.get_submodule(place).register_forward_hook(raising)
    before = look(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        sparsify.export(model, example=torch.randn(4, 12))
    assert look(model) == before
    assert model.config.use_cache
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    hook.remove()


@pytest.mark.parametrize("format", ["csr", "dense", "auto"])
def test_made_and_called_under_inference_mode(format: str) -> None:
    with torch.inference_mode():
        born = masked()
    model, x = masked(), torch.randn(4, 12)
    with torch.inference_mode():
        exports = [sparsify.export(m, format=format, copy=own) for m in (model, born) for own in (True, False)]
        inside = [fast(x) for fast in exports]
        copies = [copy.deepcopy(fast) for fast in exports[:1]]
        copies[0].load_state_dict(exports[0].state_dict())
        moved = copy.deepcopy(exports[0]).double().float()
    for fast, found in zip(exports, inside, strict=True):
        torch.testing.assert_close(found.clone(), model(x).detach())
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
    with torch.no_grad():  # torch's own modules were copied inside
        assert torch.equal(moved(x), exports[0](x))
        assert torch.equal(copies[0](x), exports[0](x))
    for fast in (exports[0], exports[2]):
        fast(x.clone().requires_grad_()).sum().backward()
        assert fast.head.weight is not None
        assert fast.body[0].bias.grad is not None


def test_converting_the_export_leaves_the_model_alone() -> None:
    model = masked()
    sparsify.export(model, format="csr", copy=False).half()
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert model.body[1].running_mean.dtype == model.head.weight.dtype == torch.float32


def test_masked_weights_that_an_optimizer_moved_are_not_exported() -> None:
    model = masked()
    with torch.no_grad():
        for layer in (model.body[0], model.head):
            layer.weight.add_(1.0)
    x = torch.randn(3, 12)
    for format in ("csr", "dense"):
        assert torch.equal(sparsify.export(model, format=format)(x), model(x))


def test_hooks_and_shared_modules_are_kept() -> None:
    model = masked()
    model.body.add_module("again", model.body[3])
    calls: list[str] = []
    model.head.register_forward_hook(lambda *_: calls.append("head"))
    fast = sparsify.export(model, format="csr")
    assert fast.body.again is fast.body[3]
    nn.Sequential(fast.head)(torch.randn(1, 12))
    assert calls == ["head"]


def test_a_root_that_is_a_layer() -> None:
    layer = sparsify.prune(sparsify.convert(nn.Linear(8, 4)), 0.75)
    fast = sparsify.export(layer, format="csr")
    assert isinstance(fast, CSRLinear)
    assert isinstance(layer, SparseLinear)
    x = torch.randn(2, 8)
    assert torch.equal(fast(x), layer(x))


def test_a_mix_of_exported_and_new_layers_exports_again() -> None:
    fast = sparsify.export(masked(), format="csr")
    fast.head = SparseLinear(12, 6, 0.5, seed=0)
    again = sparsify.export(fast, format="csr")
    assert isinstance(again.head, CSRLinear)
    x = torch.randn(2, 12)
    assert torch.equal(again.eval()(x), fast.eval()(x))


def test_to_dense_undoes_export() -> None:
    model, x = masked(), torch.randn(3, 12)
    dense = sparsify.to_dense(sparsify.export(model, format="csr"))
    assert type(dense.head) is nn.Linear
    assert torch.equal(dense(x), model(x))
    assert torch.equal(dense.head.weight, model.head.weight)


def unpicklable(model: Net) -> Net:
    model.generator = (i for i in range(3))  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net, "no SparseLinear to export"),
        (lambda: masked().to("meta"), r"body\.0: the weight is on the meta device"),
        (lambda: unpicklable(masked()), "cannot be copied"),
    ],
)
def test_what_cannot_be_exported(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify.export(model(), format="csr")


def test_an_unknown_format_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'ell' is none of: auto, dense, csr"):
        sparsify.export(masked(), format="ell")  # type: ignore[arg-type]


# report


def test_report_lists_every_linear_layer_with_its_bytes() -> None:
    model = masked()
    dense, fast = sparsify.report(Net()), sparsify.report(sparsify.export(model, format="csr"))
    assert [row.name for row in dense] == [row.name for row in fast] == ["body.0", "body.3", "head"]
    assert [row.format for row in dense] == ["dense"] * 3
    assert [row.format for row in sparsify.report(model)] == ["masked"] * 3
    assert [row.format for row in fast] == ["csr"] * 3
    assert [row.shape for row in fast] == [(24, 12), (12, 24), (6, 12)]
    assert [row.sparsity for row in fast] == [0.75] * 3
    assert [row.n_bytes for row in dense] == [row.dense_bytes for row in fast] == [1152, 1152, 288]
    assert [row.n_bytes for row in fast] == [25 * 4 + 72 * 5, 13 * 4 + 72 * 5, 7 * 4 + 18 * 5]


def test_report_total_is_the_sum_weighted_by_size() -> None:
    model = masked(0.5)
    model.head.sparse_update(1.0)
    total = sparsify.report(model).layers
    assert total.shape == (1, 648)
    assert total.sparsity == pytest.approx((288 + 72) / 648)
    assert total.n_bytes == sum(row.n_bytes for row in sparsify.report(model))


def test_report_is_a_sequence_and_prints_a_line_for_each_layer() -> None:
    rows = sparsify.report(masked())
    assert len(rows) == 3
    assert rows[-1].name == "head"
    lines = str(rows).splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("total: 732 parameters, sparsity 0.6639, ")
    assert lines[1].startswith("of these: 3 layers, 648 weights, sparsity 0.7500, ")
    assert lines[2].startswith("Pruned layers hold 88.5% of the model's 732 parameters. Dense: ")
    assert lines[4].split() == ["layer", "shape", "sparsity", "format", "bytes", "of", "dense"]
    assert lines[6].split()[:4] == ["body.0", "24x12", "0.7500", "masked"]
    assert "(root)" in str(sparsify.report(nn.Linear(2, 2)))


def test_report_of_a_model_without_layers() -> None:
    rows = sparsify.report(nn.ReLU())
    assert len(rows) == 0
    assert rows.total.sparsity == 0.0
    assert "total" in str(rows)


def test_report_does_not_touch_the_model() -> None:
    model = masked()
    before = copy.deepcopy(model.state_dict())
    sparsify.report(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])

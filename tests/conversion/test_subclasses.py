"""Linears that are not quite nn.Linear: they convert and compute the same, or one sentence says why they do not."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparsify
from sparsify import LeftDenseWarning, SparseLinear, convert, export, prune, to_dense

X = torch.linspace(-1, 1, 24).reshape(3, 8)


class WithLabel(nn.Linear):
    """Adds data, no behaviour."""

    def __init__(self, *size: int) -> None:
        super().__init__(*size)
        self.label = "mine"

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class Callable_(nn.Linear):
    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


class WithMethod(nn.Linear):
    def norm(self) -> Tensor:
        return self.weight.norm()


class Negated(WithLabel):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


def test_a_subclass_that_only_adds_data_converts() -> None:
    layer = WithLabel(8, 4)
    expected = layer(X)
    model = convert(nn.Sequential(layer))
    assert type(layer) is SparseLinear
    assert layer.label == "mine"
    assert torch.equal(model(X), expected)
    assert type(to_dense(model)[0]) is nn.Linear


@pytest.mark.parametrize(("kind", "own"), [(Callable_, "__call__"), (WithMethod, "norm"), (Negated, "forward")])
def test_a_subclass_with_behaviour_of_its_own_stays_dense(kind: type[nn.Linear], own: str) -> None:
    model = nn.Sequential(kind(8, 8), nn.Linear(8, 4))
    expected = model(X)
    with pytest.warns(
        LeftDenseWarning, match=f"0 \\(it is a {kind.__name__}, a subclass of nn.Linear with its own {own}"
    ):
        convert(model)
    assert type(model[0]) is kind
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(
    ("norm", "fold"),
    [
        (nn.utils.parametrizations.weight_norm, lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")),
        (nn.utils.parametrizations.spectral_norm, lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    ],
    ids=["weight_norm", "spectral_norm", "old spectral_norm"],
)
def test_the_way_out_that_the_notice_names_works(norm: Any, fold: Any) -> None:
    layer = norm(nn.Linear(8, 4)).eval()
    expected = layer(X)
    with pytest.raises(ValueError, match=r"fold that first, with|remove_spectral_norm"):
        convert(nn.Sequential(layer))
    fold(layer)
    model = convert(nn.Sequential(layer))
    torch.testing.assert_close(model(X), expected)
    assert prune(model, 0.5)[0].sparsity == 0.5


class Packed(Tensor):
    """A quantized weight, as some libraries make them: a tensor subclass that stands for the numbers."""


def quantized() -> nn.Linear:
    layer = nn.Linear(8, 4)
    weight = layer.weight.detach().as_subclass(Packed)
    weight._is_param = True  # what nn.Parameter does with a subclass
    layer._parameters["weight"] = weight  # type: ignore[assignment]
    return layer


def integers(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 8).to(dtype), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (quantized, "its weight is a Packed, not a plain floating Parameter"),
        (lambda: integers(torch.int8), "its weight is a Parameter of torch.int8"),
        (lambda: integers(torch.complex64), "its weight is a Parameter of torch.complex64"),
    ],
    ids=["subclass", "int8", "complex"],
)
def test_a_weight_that_is_no_plain_float_stays(layer: Any, found: str) -> None:
    model = nn.Sequential(layer(), nn.Linear(4, 4))
    with pytest.warns(LeftDenseWarning, match=f"{found}.*; prune the model before it is quantized"):
        convert(model)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1], SparseLinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_frozen_weights(dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 4).to(dtype).requires_grad_(False)
    expected = layer(X.to(dtype))
    model = convert(nn.Sequential(layer))
    assert torch.equal(model(X.to(dtype)), expected)
    prune(model, 0.5)
    assert not layer.weight.requires_grad
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(export(model)(X.to(dtype)), model(X.to(dtype)))


# peft


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.query(x)))


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is missing: pip install peft")
    model = peft.get_peft_model(Block(), peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    return model.eval()


def test_of_a_lora_layer_the_base_is_pruned_and_the_adapters_are_not() -> None:
    model = adapted()
    expected = model(X)
    deltas = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    convert(model)  # without a warning
    assert torch.equal(model(X), expected)
    sparse = [name for name, m in model.named_modules() if isinstance(m, SparseLinear)]
    assert sparse == ["base_model.model.query.base_layer", "base_model.model.out"]
    prune(model, 0.5)
    assert deltas
    assert all(torch.equal(p, deltas[name]) for name, p in model.named_parameters() if name in deltas)
    base, lora = model.base_model.model.query.base_layer, model.base_model.model.query
    assert base.sparsity == 0.5
    delta = lora.lora_B["default"](lora.lora_A["default"](X)) * lora.scaling["default"]
    torch.testing.assert_close(lora(X), nn.functional.linear(X, base.weight, base.bias) + delta)
    fast = export(model, format="csr")
    assert torch.equal(fast(X), model(X))
    with pytest.raises(ValueError, match="matches no layer"):
        convert(adapted(), include="*.lora_A.default")


def test_lora_added_to_a_converted_model_trains_beside_the_mask() -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: pip install peft")
    base = prune(convert(Block()), 0.5)
    expected = base(X)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"]))
    torch.testing.assert_close(model(X), expected)  # B starts at zero
    model(X).square().sum().backward()
    query = model.base_model.model.query
    assert query.lora_B["default"].weight.grad.any()
    assert query.base_layer.weight.grad is None


def test_merging_into_a_mask_is_refused_and_into_its_dense_model_is_whole() -> None:
    model = prune(convert(adapted()), 0.5)
    layer = model.base_model.model.query
    wanted = layer.base_layer.masked_weight() + layer.get_delta_weight("default")
    with pytest.raises(ValueError, match=r"merging would lose that part: .*sparsify\.to_dense\(model\)"):
        copy.deepcopy(model).merge_and_unload()
    merged = to_dense(copy.deepcopy(model)).merge_and_unload()
    torch.testing.assert_close(merged.query.weight, wanted)
    fast = export(model, format="csr")
    with pytest.raises((RuntimeError, ValueError), match=r"packed"):
        fast.merge_and_unload()


# Distributed wrappers


@pytest.fixture
def _group(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def train(model: nn.Module, pruner: sparsify.Pruner | None = None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        if pruner:
            pruner.step()


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_under_ddp(wrapped_first: bool) -> None:
    inner = two()
    if wrapped_first:
        model: nn.Module = nn.parallel.DistributedDataParallel(inner)
        prune(convert(model), 0.5)
    else:
        model = nn.parallel.DistributedDataParallel(prune(convert(inner), 0.5))
    alone = prune(convert(two()), 0.5)
    train(model)
    train(alone)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(inner.state_dict()[name], tensor), name
    assert not inner[0].weight[~inner[0].mask].any()
    torch.testing.assert_close(export(model.module, format="csr")(X), model(X))


@pytest.mark.usefixtures("_group")
def test_fully_shard_after_convert_trains_as_without_it() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = dist.init_device_mesh("cpu", (1,))
    recipe = sparsify.Recipe(
        groups=[{"sparsity": 0.75, "schedule": {"kind": "linear", "end": 2, "every": 1}}]  # type: ignore[list-item]
    )
    model, alone = prune(convert(two()), 0.25), prune(convert(two()), 0.25)
    fsdp.fully_shard(model[0], mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    convert(model)  # changes nothing
    for net in (model, alone):
        train(net, sparsify.Pruner(net, recipe))
    for layer, other in ((model[0], alone[0]), (model[2], alone[2])):
        weight = layer.weight.full_tensor()
        torch.testing.assert_close(weight, other.weight)
        assert torch.equal(layer.mask, other.mask)
        assert layer.sparsity == 0.75
        assert not weight[~layer.mask].any()
    with pytest.raises(ValueError, match=r"0.weight: it is sharded, a DTensor; gather the model's state_dict"):
        export(model)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = convert(two())
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    torch.testing.assert_close(export(whole, format="csr")(X), model(X))


@pytest.mark.usefixtures("_group")
def test_fully_shard_before_convert_is_one_sentence() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = two()
    fsdp.fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"its weight is sharded \(a DTensor\); convert the model before fully_shard"):
        convert(model)

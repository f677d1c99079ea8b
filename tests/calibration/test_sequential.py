"""Calibration sees the true input of each layer, in execution order, after the changes of all layers before."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import weight
from torch import Tensor, nn

from sparsify.calibration.batches import read_batches
from sparsify.calibration.model_trace import TraceRecorder, trace_model
from sparsify.calibration.sequential import calibrate_groups
from sparsify.masking.gram import Gram, SampledGram

BATCHES = [weight((5, 8), seed=i) for i in range(3)]


class Residual(nn.Module):
    """Two layers of three that share an input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = x + self.out(torch.tanh(self.left(x)) * self.right(x))
        return x if scale is None else x * scale


class Stack(nn.Module):
    """A layer, a chain of blocks that get an argument beside the hidden state, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = (
            nn.Linear(8, 8),
            nn.ModuleList(Residual() for _ in range(3)),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean(1, keepdim=True)
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=scale)
        return self.last(x)


class Skips(Stack):
    """The last layer also gets the output of the first block: the blocks cannot be bypassed."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 0:
                skipped = x
        return self.last(x + skipped)


class Dependent(Stack):
    """An argument of each block is made from the hidden state."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, x.mean(1, keepdim=True))
        return self.last(self.first(x))


class Twice(Stack):
    """One block runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks[2](self.blocks[0](self.blocks[1](self.blocks[0](self.first(x))))))


class Writes(nn.Module):
    """A block that writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(2.0))


class Two(nn.Module):
    """Two chains with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.ModuleList(Residual() for _ in range(2)), nn.ModuleList(Residual() for _ in range(2))
        self.between = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.one:
            x = block(x)
        x = memory = self.between(x)
        for block in self.two:
            x = block(x, memory)
        return x


MODELS: dict[str, Callable[[], nn.Module]] = {
    "stack": Stack,
    "skips": Skips,
    "dependent": Dependent,
    "twice": Twice,
    "two chains": Two,
    "sequential": lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.Linear(4, 3)),
    "writes": lambda: nn.Sequential(nn.Linear(8, 8), Writes(), Writes(), nn.Linear(8, 8)),
    "root": lambda: nn.Linear(8, 3),
    "names": lambda: nn.Sequential(OrderedDict(a=nn.Linear(8, 8), ab=nn.Linear(8, 8))),
}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def inputs_by_hook(model: nn.Module, name: str) -> Tensor:
    """Return a layer's inputs over all batches, by one plain run of the whole model under a hook."""
    rows: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].detach().clone()))
    with torch.no_grad():
        for batch in BATCHES:
            model(batch.clone())
    hook.remove()
    return torch.cat(rows).double()


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hook in (
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            module.__dict__.get("forward"),
        )
        if hook is not None
    ]


@pytest.mark.parametrize("kind", MODELS)
def test_each_layer_is_seen_with_those_before_it_changed(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    before = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    seen: list[str] = []
    for group in calibrate_groups(model, linears(model), [batch.clone() for batch in BATCHES]):
        for name in group.names:
            rows = inputs_by_hook(model, name)
            torch.testing.assert_close(group.gram.matrix, rows.T @ rows, rtol=1e-5, atol=1e-5)
            assert group.gram.n_rows == len(rows)
        for name in group.names:
            with torch.no_grad():
                model.get_submodule(name).weight.mul_(0.5)
        seen += group.names
    assert sorted(seen) == sorted(before)
    assert not hooks_of(model)


def test_execution_order_and_shared_inputs() -> None:
    names = [group.names for group in calibrate_groups(Stack(), linears(Stack()), BATCHES)]
    blocks = [[(f"blocks.{i}.left", f"blocks.{i}.right"), (f"blocks.{i}.out",)] for i in range(3)]
    assert names == [("first",), *blocks[0], *blocks[1], *blocks[2], ("last",)]
    assert [group.names for group in calibrate_groups(Twice(), linears(Twice()), BATCHES)][1:4] == [
        ("blocks.0.left",),  # it runs twice, so that its second input is not its neighbour's
        ("blocks.0.right",),
        ("blocks.0.out",),
    ]


@pytest.mark.parametrize(
    ("kind", "chains"),
    [
        ("stack", [("blocks.0", "blocks.1", "blocks.2")]),
        ("two chains", [("one.0", "one.1"), ("two.0", "two.1")]),
        ("skips", []),
        ("dependent", []),
        ("twice", []),
    ],
)
def test_blocks_run_alone_only_where_that_is_right(kind: str, chains: list[tuple[str, ...]]) -> None:
    model = MODELS[kind]().eval()
    assert list(trace_model(model, linears(model), read_batches(model, BATCHES))[0].chains) == chains


def test_a_chain_costs_a_run_for_each_group_of_a_block_and_no_more() -> None:
    model, runs = Stack(), []
    model.blocks[1].left.register_forward_hook(lambda *_: runs.append(1))
    list(calibrate_groups(model, linears(model), BATCHES))
    # Three runs of the model to see how it runs; then for each batch its second group and its output; the last layer
    # is reached with the chain bypassed.
    assert len(runs) == 2 + 2 * len(BATCHES)


def test_a_layer_that_runs_on_some_batches_only() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.experts[which](x)

    model = Experts()
    groups = list(calibrate_groups(model, linears(model), [(BATCHES[0], 0), (BATCHES[1], 2), (BATCHES[2], 1)]))
    assert [(group.names, group.gram.n_rows) for group in groups] == [
        (("experts.0",), 5),
        (("experts.2",), 5),
        (("experts.1",), 5),
    ]
    with pytest.raises(ValueError, match=r"experts\.1: never ran .* exclude=\['experts\.1'\]"):
        list(calibrate_groups(model, linears(model), [(BATCHES[0], 0), (BATCHES[1], 2)]))


def test_flags_and_caches_are_put_back() -> None:
    class Config:
        use_cache = True

    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    model.config = Config()
    model[0].eval()
    groups = calibrate_groups(model, linears(model), BATCHES)
    next(groups)
    assert not model.training
    assert not model.config.use_cache
    groups.close()
    assert [module.training for module in model] == [False, True, True]
    assert model.training
    assert model.config.use_cache


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_no_number(bad: float) -> None:
    batches = [batch.clone() for batch in BATCHES]
    batches[1][0, 0] = bad
    model = Stack()
    with pytest.raises(ValueError, match=r"first: its input in batch 1 .* NaN or Inf"):
        list(calibrate_groups(model, linears(model), batches))
    assert not hooks_of(model)
    assert model.training


def test_data_of_every_kind() -> None:
    model = nn.Linear(8, 3)
    x = BATCHES[0]
    for data in ([x], [(x,)], [[x, torch.zeros(5)]], [{"input": x}], iter([x]), torch.utils.data.DataLoader(x, 2)):
        (group,) = calibrate_groups(model, [""], data)
        torch.testing.assert_close(group.gram.matrix.float(), x.T @ x)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calibration data is empty"),
        (iter(()), "calibration data is empty"),
        (["text"], "batch 0 of the calibration data is a str"),
        ([{"wrong": BATCHES[0]}], r"does not run on batch 0 .* TypeError"),
        ([torch.zeros(3, 7)], r"does not run on batch 0 .* RuntimeError"),
    ],
)
def test_data_that_cannot_be_used(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(calibrate_groups(nn.Linear(8, 3), [""], data))


def test_an_error_in_the_middle_of_the_data() -> None:
    def broken() -> Iterator[Tensor]:
        yield BATCHES[0]
        raise OSError("the disk is gone")

    model = Stack()
    with pytest.raises(OSError, match="the disk is gone"):
        list(calibrate_groups(model, linears(model), broken()))
    assert model.training


@pytest.mark.parametrize("n_features", [1, 7, 384, 385, 800])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gram_is_the_sum_of_products(n_features: int, dtype: torch.dtype) -> None:
    gram = Gram(n_features)
    rows = [weight((n, n_features), dtype, seed=n) for n in (3, 1, 20)]
    for part in rows:
        gram.add(part)
    exact = torch.cat(rows).double()
    torch.testing.assert_close(gram.matrix, exact.T @ exact, rtol=1e-5, atol=1e-5)
    assert gram.n_rows == 24
    assert torch.equal(gram.matrix, gram.matrix.T)


@pytest.mark.parametrize("n_rows", [0, 1, 100, 4096, 4097, 20_000])
def test_a_sampled_gram_has_an_exact_diagonal_and_a_sample_of_the_rest(n_rows: int) -> None:
    rows = weight((n_rows, 5), seed=n_rows) @ weight((5, 5))
    gram = SampledGram(5)
    for part in rows.split(700):
        gram.add(part)
    found, exact = gram.finish().matrix, rows.double().T @ rows.double()
    torch.testing.assert_close(found.diagonal(), exact.diagonal(), rtol=1e-5, atol=1e-5)
    # Products of n sampled rows have an error of about their size over the root of n, here 2048 and more.
    scale = exact.diagonal().sqrt()
    error = ((found - exact) / scale / scale[:, None]).abs().max() if n_rows else 0.0
    assert error < (1e-5 if n_rows <= 4096 else 5 / 2048**0.5)
    assert gram.finish().n_rows == n_rows


def test_many_batches_lose_no_digits() -> None:
    """2,000 batches in float32 would be off by about 1e-4."""
    gram, part = Gram(2), torch.full((1, 2), 0.1)
    for _ in range(2000):
        gram.add(part)
    torch.testing.assert_close(gram.matrix, torch.full((2, 2), 2000 * 0.01, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_recorder_keeps_no_tensors() -> None:
    model = Stack()
    recorder = TraceRecorder(model, linears(model))
    recorder.run(lambda: model(BATCHES[0]))
    assert recorder._input is None
    assert not recorder._hidden
    assert copy.deepcopy(recorder.trace(())).groups == recorder.trace(()).groups


class InPlace(Stack):
    """Its blocks write into what their layers return."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.left = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))


@pytest.mark.parametrize("make", [Stack, InPlace, Two, Skips])
@pytest.mark.parametrize("cache_bytes", [None, 0, 700, 10**6])
def test_finished_layers_run_once_and_the_inputs_are_the_same(
    make: Callable[[], nn.Module], cache_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrated() -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        model, n_runs = make(), 0

        def count(*_: Any) -> None:
            nonlocal n_runs
            n_runs += 1

        found = []
        for group in calibrate_groups(model, linears(model), BATCHES, cache_bytes=cache_bytes):
            found.append(group.gram.matrix)
            for name in group.names:
                model.get_submodule(name).weight.data *= 0.5
                own = model.get_submodule(name).forward
                monkeypatch.setattr(
                    model.get_submodule(name), "forward", lambda x, own=own: (count(), own(x))[1], raising=False
                )
        return found, n_runs

    kept, n_runs = calibrated()
    monkeypatch.setattr("sparsify.calibration.output_cache.MemoryBudget.take", lambda *_: False)
    again, n_all = calibrated()
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    if cache_bytes is None or cache_bytes == 10**6:
        assert n_runs <= len(BATCHES) * len(linears(make())) < n_all
    elif cache_bytes == 0:
        assert n_runs == n_all

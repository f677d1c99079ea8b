"""export(format="auto"): measured, never slower than dense by its own measurement, and it says why."""

import time

import pytest
import torch
from tested_kernels import needs_native
from torch import nn

import sparsify
from sparsify.hardware import gpu_timing
from sparsify.hardware.timing import LoadMeter, measure
from sparsify.inference import form_selection as choose
from sparsify.inference.form_selection import FormSelector
from sparsify.kernels.cpu import library as native
from sparsify.layers.records import MARGIN, FormChoice


def pruned(sparsity=0.9, sizes=(256, 256), dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes, dtype=dtype), nn.ReLU(), nn.Linear(*reversed(sizes), dtype=dtype))
    return sparsify.prune(sparsify.convert(model), sparsity)


def fake_times(monkeypatch, **times):
    monkeypatch.setattr(FormSelector, "_measure", lambda *_: dict(times))


@pytest.mark.parametrize(
    ("times", "form"),
    [
        ({"dense": 100.0, "panel": 50.0, "bitmask": 60.0}, "panel"),
        ({"dense": 100.0, "panel": 80.0, "bitmask": 60.0}, "bitmask"),
        ({"dense": 100.0, "panel": 100.0 * MARGIN + 0.1, "bitmask": 200.0}, "dense"),
        ({"dense": 100.0}, "dense"),
    ],
)
def test_the_fastest_is_taken_and_dense_where_nothing_beats_it(monkeypatch, times, form):
    if form not in ("dense", "csr") and not native.available():
        pytest.skip(f"no native kernels: {native.why_missing()}")
    fake_times(monkeypatch, **times)
    fast = sparsify.export(pruned())
    for row in sparsify.report(fast):
        assert (row.format, row.times_us) == (form, times)
        assert row.sparsity == pytest.approx(0.9, abs=1e-4)
    assert isinstance(fast[0], nn.Linear if form == "dense" else sparsify.CSRLinear)


def test_the_report_says_why():
    times = {"dense": 100.0, "panel": 50.0, "bitmask": 160.0}
    assert FormChoice("panel", 64, times, "m").reason == "2.00x dense for 64 tokens (50 of 100 us)"
    slow = {"dense": 100.0, "panel": 200.0, "bitmask": 125.0}
    assert FormChoice("dense", 64, slow, "m").reason == "sparse is no faster for 64 tokens: bitmask 0.80x dense"
    assert "sparsify doctor" in FormChoice("dense", 64, {"dense": 100.0}, "m").reason
    assert FormChoice("csr", 0, {}, "").reason == "asked for"


@needs_native
def test_a_real_measurement_times_every_form_and_each_kind_of_layer_once(monkeypatch):
    calls = []
    original = FormSelector._measure
    monkeypatch.setattr(FormSelector, "_measure", lambda *a: calls.append(1) or original(*a))
    monkeypatch.setattr(LoadMeter, "others_cores", lambda self: 0.0)
    model = sparsify.convert(nn.Sequential(*(nn.Linear(96, 96) for _ in range(3)), nn.Linear(96, 96, bias=False)))
    rows = sparsify.report(sparsify.export(sparsify.prune(model, 0.9), tokens=16))
    assert len(calls) == 2
    for row in rows:
        assert set(row.times_us) == {"dense", *native.FORMS}
        assert all(t > 0 for t in row.times_us.values())
        assert row.times_us[row.format] == min(row.times_us.values()) or row.format == "dense"
        assert row.times_us[row.format] <= row.times_us["dense"]


def test_where_no_native_kernel_runs_the_layer_stays_dense_and_says_so():
    fast = sparsify.export(pruned(sizes=(16, 16), dtype=torch.float64))
    rows = list(sparsify.report(fast))
    assert [row.format for row in rows] == ["dense", "dense"]
    assert all("no sparse kernel runs here" in row.reason for row in rows)
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(fast(x), pruned(sizes=(16, 16), dtype=torch.float64)(x))


@needs_native
def test_a_layer_that_nobody_pruned_stays_dense_for_its_own_reason():
    rows = list(sparsify.report(sparsify.export(sparsify.convert(nn.Sequential(nn.Linear(16, 16))))))
    assert [(row.format, row.reason) for row in rows] == [
        ("dense", "no sparse form is smaller than dense at this sparsity")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"format": "csr", "tokens": 4}, "tokens=4 has no effect"),
        ({"prefer": "size"}, "prefer='size' is none of: speed, memory"),
        ({"format": "csr", "prefer": "memory"}, "prefer='memory' has no effect"),
        ({"format": "fast"}, "'fast' is none of: auto, dense, csr"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparsify.export(pruned(), **arguments)


def test_a_form_that_does_not_run_here_is_an_error_with_the_way_out():
    with pytest.raises(ValueError, match=r"0: the form 'panel' does not run .* use format='csr'"):
        sparsify.export(pruned(sizes=(8, 8), dtype=torch.float64), format="panel")


def test_measuring_draws_no_random_numbers_of_the_users(monkeypatch):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    choose.FormSelector(4).choose(sparsify.SparseLinear(8, 8, 0.0, device="meta").to_empty(device="cpu"))
    assert torch.equal(torch.rand(3), expected)


def test_memory_is_part_of_the_choice():
    times = {"dense": 100.0, "panel": 50.0, "bitmask": 51.0, "gather": 200.0}
    n_bytes = {"dense": 1000, "panel": 800, "bitmask": 600, "gather": 500}
    assert choose._best(times, n_bytes, "speed") == "bitmask"  # as fast as panel within the margin, and smaller
    assert choose._best({**times, "bitmask": 52.0}, n_bytes, "speed") == "panel"
    assert choose._best(times, n_bytes, "memory") == "gather"
    assert choose._best({"dense": 1.0}, {"dense": 1000}, "memory") == "dense"
    slower = FormChoice("gather", 64, times, "m")
    assert slower.reason == "0.50x dense for 64 tokens (200 of 100 us), taken for its memory"


@needs_native
def test_prefer_memory_takes_the_smallest_that_was_measured():
    model = pruned(0.7)
    rows = sparsify.report(sparsify.export(model, tokens=4, prefer="memory"))
    forms = [sparsify.report(sparsify.export(model, format=form)) for form in native.FORMS]
    for i, row in enumerate(rows):
        assert row.n_bytes == min(other[i].n_bytes for other in forms) < row.dense_bytes


@needs_native
def test_a_weight_of_a_large_model_is_measured_from_memory(monkeypatch):
    """The forms too: in a cache of so many bytes, ten layers at 90% fit where ten dense ones do not."""
    layer = pruned(0.9)[0]
    seen = []

    def cold(calls, n_bytes, *, rounds):
        seen.append(set(calls))
        assert n_bytes == 3 * layer.weight.nbytes
        return measure({name: [call] for name, call in calls.items()}, rounds=1, sample_s=1e-4)

    monkeypatch.setattr(choose, "last_level_cache_bytes", lambda: 3 * layer.weight.nbytes)
    monkeypatch.setattr(choose, "measure_cold", cold)
    one, ten, thousand = (
        (FormSelector(1, model_bytes=n * layer.weight.nbytes).choose(layer).times_us.keys(), seen.copy(), seen.clear())
        for n in (1, 10, 1000)
    )
    assert one[0] == ten[0] == thousand[0] >= {"dense", "bitmask", "gather"}
    assert one[1] == []
    assert {frozenset(names) for names in ten[1]} == {frozenset({"dense"})}  # a busy machine is measured twice
    assert {frozenset(names) for names in thousand[1]} == {frozenset(thousand[0])}


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@needs_native
def test_on_a_gpu_copies_of_a_layer_take_turns(monkeypatch):
    """So that none finds its weight in the cache; here with a stand-in for the device."""
    seen = {}

    def replays(calls, device, *, rounds, sample_s):
        seen.update({form: len(group) for form, group in calls.items()})
        weights = {call.__closure__[0].cell_contents._buffers["values"].data_ptr() for call in calls["panel"]}
        assert len(weights) == 3
        return measure(calls, rounds=1, sample_s=1e-4)

    monkeypatch.setattr(gpu_timing, "n_copies", lambda n_bytes, device: 3)
    monkeypatch.setattr(gpu_timing, "measure_replays", replays)
    candidates = choose._candidates(pruned()[0], ("panel",))
    with torch.inference_mode():
        times = FormSelector(4)._measure(candidates, torch.randn(4, 256).as_subclass(OnGPU))
    assert seen == {"dense": 3, "panel": 3}
    assert set(times) == set(seen)


def test_export_for_a_device_moves_a_copy():
    model = pruned(sizes=(16, 16))
    x = torch.randn(2, 16)
    fast = sparsify.export(model, format="csr", device="cpu", copy=False)
    assert torch.equal(fast(x), model(x))
    assert fast[0].bias.data_ptr() == model[0].bias.data_ptr()  # it was there already
    with pytest.raises(ValueError, match="on the meta device and has no data"):
        sparsify.export(model, format="csr", device="meta")
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@needs_native
def test_many_rows_are_not_multiplied_by_hopeless_forms(monkeypatch):
    rows_of: dict[str, set[int]] = {}

    def call(module, x):
        rows_of.setdefault(getattr(module, "form", "dense"), set()).add(x.numel() // x.shape[-1])
        slow = getattr(module, "form", "dense") in ("bitmask", "gather", "sell")
        return lambda: time.sleep(2e-3 if slow else 1e-4)

    monkeypatch.setattr(choose, "_call", call)
    model = sparsify.prune(sparsify.convert(nn.Linear(64, 64)), 0.8)
    selector = FormSelector(3 * choose.MANY_ROWS)
    choice = selector.choose(model)
    some, all_rows = choose.MANY_ROWS // 4, 3 * choose.MANY_ROWS
    assert rows_of["dense"] == rows_of["panel"] == {some, all_rows}
    assert rows_of["bitmask"] == rows_of["gather"] == {some}
    assert set(choice.times_us) == {"dense", "panel"}
    few = FormSelector(choose.MANY_ROWS).choose(model)
    assert {"bitmask", "gather"} <= set(few.times_us)


@needs_native
@pytest.mark.parametrize("layout", [None, torch.contiguous_format, torch.channels_last])
def test_a_dense_convolution_is_measured_in_the_layouts_that_images_may_have(monkeypatch, layout):
    """Images with channels first do not become others for one layer."""
    seen = []

    def measure(selector, candidates, x):
        seen.append(list(candidates))
        return {form: {"dense": 9.0, "dense, channels last": 1.0}.get(form, 5.0) for form in candidates}

    monkeypatch.setattr(FormSelector, "_measure", measure)
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    layer = sparsify.prune(sparsify.convert(model, types=(nn.Conv2d,)), 0.9)[0]
    given = None if layout is None else torch.empty(1, 16, 9, 9).to(memory_format=layout)
    choice = FormSelector(49).choose(layer, given)
    may_be_last = layout is not torch.contiguous_format
    assert ("dense, channels last" in seen[0]) is may_be_last
    assert choice.form == ("dense" if may_be_last else "panel")
    assert "dense, channels last" not in choice.times_us

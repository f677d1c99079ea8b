"""Timing on a GPU, with a stand-in for the device: what is captured, how often, and what is divided by what."""

import contextlib
import time

import pytest
import torch

from sparsify.hardware import gpu_timing
from sparsify.hardware.timing import Timing, measure

CUDA = torch.device("cuda")


class Properties:
    L2_cache_size = 50 << 20


@pytest.mark.parametrize(("n_bytes", "n"), [(200 << 20, 1), (50 << 20, 2), (30 << 20, 4), (1 << 20, 100), (1, 256)])
def test_weights_in_rotation_exceed_the_cache(n_bytes: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert gpu_timing.n_copies(n_bytes, CUDA) == n


def test_a_replay_makes_all_calls_and_counts_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, waited = [], []
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(len(calls)))
    monkeypatch.setattr(gpu_timing, "_captured", lambda group: lambda: [call() for call in group])
    timings = gpu_timing.measure_replays({"a": [lambda: calls.append(1)] * 4}, CUDA, rounds=3, sample_s=1e-4)
    assert len(calls) % 4 == 0
    assert waited[:3] == [4, 8, 12]  # the calls that warm up are waited for one by one
    monkeypatch.setattr(gpu_timing, "measure", lambda *_, **__: {"a": Timing(8.0, 4.0, 12.0, 3)})
    assert gpu_timing.measure_replays({"a": [lambda: None] * 4}, CUDA) == {"a": Timing(2.0, 1.0, 3.0, 3)}
    assert timings["a"].median_s > 0


def test_the_clock_stops_when_the_device_is_done() -> None:
    timing = measure({"a": [lambda: None]}, rounds=3, sample_s=1e-4, wait=lambda: time.sleep(2e-3))["a"]
    assert timing.median_s > 1e-3

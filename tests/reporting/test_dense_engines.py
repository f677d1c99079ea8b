"""Dense models in other engines: right answers, the model untouched, and the reason where there is none."""

import copy
import importlib.util
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from sparsify.reporting import dense_engines as engines
from sparsify.reporting.dense_engines import Engine, dense_engines
from sparsify.reporting.model_bench import EngineBench, ModelBench, Timing, bench

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    """Two layers and a residual; the output is a dict."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return {"y": x + self.down(torch.relu(self.up(x))), "other": x}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


#: Measures two models, and then gets a signal with a handler: a child that ends.
SIGNALLED = """
import faulthandler, gc, signal, subprocess, sys, tempfile
from pathlib import Path
import torch
from sparsify.reporting.dense_engines import dense_engines

faulthandler.enable()
signal.signal(signal.SIGCHLD, lambda *_: print("signalled"))
engines = []
for _ in range(2):
    with tempfile.TemporaryDirectory() as folder:
        arguments = torch.nn.Linear(8, 8).eval(), (torch.ones(2, 8),), Path(folder)
        engines.append(list(dense_engines(*arguments, ["torch int8", "ONNX Runtime int8"])))
while engines:
    engines.pop(0)
    gc.collect()
subprocess.run([sys.executable, "-c", ""], check=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="this system has no signal for the end of a child")
def test_a_signal_after_the_engines_does_not_end_the_process():
    for package in engines._NEEDS["OpenVINO float32"]:
        pytest.importorskip(package)
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("signalled\n")


def test_every_installed_engine_computes_the_model(model, tmp_path):
    x, before = torch.randn(5, 32), copy.deepcopy(model.state_dict())
    found = {engine.name: engine for engine in dense_engines(model, {"x": x}, tmp_path)}
    assert list(found) == list(engines._NEEDS)
    right = model(x)["y"]
    for name, engine in found.items():
        missing = [p for p in engines._NEEDS[name] if importlib.util.find_spec(p) is None]
        if missing:
            assert engine.why == f"{' and '.join(missing)} not installed"
            continue
        assert engine.call is not None, engine.why
        assert engine.error < (1e-5 if name.endswith("float32") else 0.03)
        assert engine.n_bytes > 0
        torch.testing.assert_close(engine.call(), right, atol=0.1, rtol=0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_model_that_cannot_be_exported_is_told_with_the_reason(tmp_path):
    pytest.importorskip("onnxscript")

    class Odd(Model):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    torch.manual_seed(0)
    found = {e.name: e for e in dense_engines(Odd().eval(), (torch.randn(2, 32),), tmp_path)}
    assert found["torch int8"].call is not None
    for name, engine in found.items():
        if name != "torch int8" and "not installed" not in engine.why:
            assert engine.call is None
            assert engine.why.startswith("no ONNX: ")


def test_large_models_are_not_exported(model, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(engines, "MOST_BYTES", 1000)
    found = {e.name: e for e in dense_engines(model, (torch.randn(2, 32),), tmp_path)}
    assert "16,768 bytes, and ONNX holds 1,000" in found["ONNX Runtime float32"].why


def test_bench_measures_the_engines_and_names_a_faster_one(model, monkeypatch):
    def two(*_):
        yield Engine("OpenVINO int8", lambda: torch.zeros(1), 0.01, 5)
        yield Engine("ONNX Runtime float32", why="onnxruntime not installed")

    monkeypatch.setattr("sparsify.reporting.model_bench.dense_engines", two)
    result = bench(model, (torch.randn(4, 32),), 0.9, rounds=3, engines=True)
    fast, absent = result.engines
    assert fast.time is not None
    assert absent.time is None
    assert "ONNX Runtime float32: not measured: onnxruntime not installed" in str(result)
    assert bench(model, (torch.randn(4, 32),), 0.9, rounds=3).engines == ()


def test_the_text_names_the_fastest_of_each_kind():
    def timing(seconds):
        return Timing(seconds, seconds, seconds, 3)

    others = (
        EngineBench("ONNX Runtime float32", timing(0.8), 0.0, ""),
        EngineBench("OpenVINO float32", timing(0.5), 0.0, ""),
        EngineBench("torch int8", timing(1.5), 0.01, ""),
    )
    text = str(ModelBench(0.9, 4, "here", timing(1.0), timing(0.25), (), 0.0, others))
    assert "is not the fastest: OpenVINO float32 is 2.00x as fast" in text
    assert "sparse is 2.00x as fast" in text
    assert "int8 is" not in text

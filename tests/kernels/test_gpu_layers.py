"""A layer in a form for GPUs that moves, loads and saves: its form changes, and no bit of its weight."""

from pathlib import Path

import pytest
import torch
from gpu_weights import assert_same_bits, blocks, pretend_a_gpu
from tested_kernels import needs_native

import sparsify
from sparsify import CSRLinear, SparseLinear
from sparsify.inference.form_selection import FormSelector


def test_two_layers_alike_but_for_their_pattern_are_measured_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_a_gpu(monkeypatch)
    model = sparsify.convert(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)))
    sparsify.prune(model[0], 0.5, pattern="16x16")
    sparsify.prune(model[1], 0.5)
    monkeypatch.setattr(FormSelector, "_measure", lambda _, candidates, x: {form: 1 / len(form) for form in candidates})
    assert [row.format for row in sparsify.report(sparsify.export(model))] == ["blocks", "narrow"]


@needs_native
@pytest.mark.parametrize(("sparsity", "form"), [(0.5, "tiles"), (0.9, "narrow")])
def test_a_layer_that_moves_to_a_gpu_and_back_changes_its_form_and_no_bit(sparsity: float, form: str) -> None:
    layer = CSRLinear.from_sparse(SparseLinear(70, 30, sparsity, seed=0), form="bitmask")
    before = layer.csr
    with pytest.MonkeyPatch.context() as patched:
        pretend_a_gpu(patched)
        layer._apply(lambda tensor: tensor.clone())
        assert (layer.form, set(layer._buffers)) == (form, {"index", "values"})
        assert_same_bits(layer.csr, before)
        state = layer.state_dict()
        assert set(state) == {"bias", "crow", "col", "values"}
        assert layer.bfloat16().form == form
        assert layer.double().form == "csr"
        layer.float()
        layer.load_state_dict(state)
        assert layer.form == form
    layer._apply(lambda tensor: tensor.clone())
    assert layer.form == "bitmask"
    assert_same_bits(layer.csr, before)


@needs_native
def test_blocks_become_tiles_for_a_mask_that_has_none_and_blocks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_a_gpu(monkeypatch)
    shape = (128, 192)
    layer = CSRLinear(192, 128, blocks(32), form="blocks")
    state, other = (
        layer.state_dict(),
        CSRLinear.from_sparse(SparseLinear(192, 128, 0.5, bias=False, seed=0), form="csr"),
    )
    layer.load_state_dict(other.state_dict())
    assert layer.form == "tiles"
    assert_same_bits(layer.csr, other.csr)
    layer.load_state_dict(state)
    assert layer.form == "blocks"
    assert_same_bits(layer.csr, blocks(32, shape))
    model = sparsify.prune(sparsify.convert(torch.nn.Sequential(torch.nn.Linear(192, 128))), 0.5)
    with pytest.raises(ValueError, match="0: its mask does not fit the form 'blocks'"):
        sparsify.export(model, format="blocks")


@needs_native
def test_what_was_packed_on_a_gpu_is_saved_and_loaded_on_the_cpu(tmp_path: Path) -> None:
    model = sparsify.prune(sparsify.convert(torch.nn.Sequential(torch.nn.Linear(70, 30))), 0.8)
    with pytest.MonkeyPatch.context() as patched:
        pretend_a_gpu(patched)
        there = sparsify.export(model, format="narrow")
        sparsify.save(there, tmp_path / "model.safetensors")
    here = sparsify.load(tmp_path / "model.safetensors", torch.nn.Sequential(torch.nn.Linear(70, 30)))
    assert here[0].form == "panel"
    assert_same_bits(here[0].csr, there[0].csr)
    assert torch.equal(here(torch.ones(2, 70)), sparsify.export(model, format="panel")(torch.ones(2, 70)))
    with pytest.MonkeyPatch.context() as patched:
        pretend_a_gpu(patched)
        here._apply(lambda tensor: tensor.clone())
        assert here[0].form == "narrow"  # the choice, not the stand-in: that would be "tiles" here
        assert_same_bits(here[0].csr, there[0].csr)

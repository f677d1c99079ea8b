"""Random sequences of everything that can be done to a model, against a model of twenty lines in numpy.

SPARSIFY_SEQUENCES says how many sequences are tried; scripts/check tries thousands.
"""

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import repeatable
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.optim.swa_utils import AveragedModel

import sparsify
from sparsify.conversion.convert import sparse_layers
from sparsify.kernels.cpu import library as native

N_SEQUENCES = int(os.environ.get("SPARSIFY_SEQUENCES", "40"))
N_STEPS = 12
WEIGHTS = ("0.weight", "2.weight")
#: 30 and 20 weights; no target is rounded up to all of a layer.
TARGETS = st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.75, 0.9, 1.0])
SEEDS = st.integers(0, 2**16)
FORMS = ("auto", "dense", "csr", *(native.FORMS if native.available() else ()))


@dataclass
class Truth:
    """The model by other means: two weights, the bias of the first layer, and the masks (True = kept)."""

    weights: list[np.ndarray]
    masks: list[np.ndarray]
    bias: np.ndarray

    def set_masks(self, masks: list[np.ndarray]) -> None:
        self.masks = masks
        self.weights = [np.where(m, w, 0).astype(np.float32) for w, m in zip(self.weights, masks, strict=True)]

    def prune(self, sparsity: float) -> None:
        masks = [np.zeros(w.shape, bool) for w in self.weights]
        for mask, kept, weight in zip(masks, self.masks, self.weights, strict=True):
            best_first = np.lexsort((-np.abs(weight).ravel(), ~kept.ravel()))  # stable: the leftmost of equal ones
            mask.ravel()[best_first[: mask.size - round(sparsity * mask.size)]] = True
        self.set_masks(masks)

    def forward(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x @ self.weights[0].T.astype(float) + self.bias, 0) @ self.weights[1].T.astype(float)

    def gradients(self, x: np.ndarray, grad: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        hidden = x @ self.weights[0].T.astype(float) + self.bias
        grad_hidden = grad @ self.weights[1] * (hidden > 0)
        both = [grad_hidden.T @ x, grad.T @ np.maximum(hidden, 0)]
        return [np.where(mask, g, 0) for mask, g in zip(self.masks, both, strict=True)], grad_hidden.sum(0)

    def cast(self, dtype: torch.dtype) -> None:
        *self.weights, self.bias = (torch.from_numpy(a).to(dtype).float().numpy() for a in (*self.weights, self.bias))


def dense_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False))


def effective(module: nn.Module) -> np.ndarray:
    """Return the weight that a layer multiplies with, be it dense, masked or packed."""
    if isinstance(module, sparsify.CSRLinear):
        return module.to_sparse().masked_weight().detach().numpy()
    return (module.masked_weight() if isinstance(module, sparsify.SparseLinear) else module.weight).detach().numpy()


def truth_of(model: nn.Module, masks: list[np.ndarray] | None = None) -> Truth:
    """Return what a model holds, under masks of its own or these."""
    weights, bias = [effective(model[i]).copy() for i in (0, 2)], model[0].bias.detach().numpy().copy()
    truth = Truth(weights, [np.ones(w.shape, bool) for w in weights], bias)
    if masks is not None:
        truth.set_masks(masks)
    return truth


def check(model: nn.Module, truth: Truth) -> None:
    for name, weight, mask in zip(("0", "2"), truth.weights, truth.masks, strict=True):
        layer = model.get_submodule(name)
        np.testing.assert_array_equal(effective(layer), weight)
        if isinstance(layer, sparsify.SparseLinear):
            np.testing.assert_array_equal(layer.mask.numpy(), mask)
        if isinstance(layer, sparsify.SparseLinear | sparsify.CSRLinear):
            assert layer.sparsity == pytest.approx(1 - mask.mean())
    x = np.random.default_rng(0).standard_normal((3, 6))
    with torch.no_grad():
        y = model(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(y, truth.forward(x), rtol=1e-4, atol=1e-5)


class Sequences(RuleBasedStateMachine):
    """A converted model and the truth about it. Copies made on the way are set aside and must stay what they were."""

    @initialize(seed=SEEDS)
    def begin(self, seed):
        torch.manual_seed(seed)
        self.folder = tempfile.TemporaryDirectory()
        self.aside, self.states = [], []
        dense = dense_model()
        self.truth = truth_of(dense)
        self.go_on_with(sparsify.convert(dense))

    def go_on_with(self, model):
        self.model, self.optimizer, self.average = model, None, None

    def through_file(self, model):
        path = Path(self.folder.name) / "model.safetensors"
        sparsify.save(model, path)
        return sparsify.load(path, dense_model())

    @rule(sparsity=TARGETS)
    def prune(self, sparsity):
        sparsify.prune(self.model, sparsity)
        self.truth.prune(sparsity)
        self.states.append((copy.deepcopy(self.model.state_dict()), self.truth.masks))

    @rule(sparsities=st.lists(TARGETS, min_size=1, max_size=3), momentum=st.sampled_from([0.0, 0.9]), seed=SEEDS)
    def train(self, sparsities, momentum, seed):
        """Steps of one optimizer, and a new target after each."""
        random = np.random.default_rng(seed)
        if self.optimizer is None or momentum != self.optimizer.defaults["momentum"]:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=momentum)
        for sparsity in sparsities:
            self.step(random.standard_normal((7, 6)), random.standard_normal((7, 4)))
            self.prune(sparsity)

    def step(self, x, grad):
        """Compare gradients; the weights that the step makes of them are taken over, but for masked ones."""
        self.optimizer.zero_grad()
        (self.model(torch.from_numpy(x).float()) * torch.from_numpy(grad).float()).sum().backward()
        grads, grad_bias = self.truth.gradients(x, grad)
        for name, expected in zip((*WEIGHTS, "0.bias"), (*grads, grad_bias), strict=True):
            np.testing.assert_allclose(self.model.get_parameter(name).grad.numpy(), expected, rtol=1e-3, atol=1e-4)
        self.optimizer.step()
        self.truth = truth_of(self.model, self.truth.masks)
        check(self.model, self.truth)

    @precondition(lambda self: self.states)
    @rule(data=st.data(), part=st.sampled_from(["all", "masks", "weights"]))
    def load_state(self, data, part):
        """A mask alone removes, and gives back zeros; weights alone come under the present masks."""
        state, masks = self.states[data.draw(st.integers(0, len(self.states) - 1))]
        wanted = {
            key: value for key, value in state.items() if part == "all" or key.endswith("mask") == (part == "masks")
        }
        self.model.load_state_dict(wanted, strict=part != "masks")
        if part != "masks":
            self.truth.weights = [state[name].numpy().copy() for name in WEIGHTS]
            self.truth.bias = state["0.bias"].numpy().copy()
        self.truth.set_masks(self.truth.masks if part == "weights" else masks)

    @rule(how=st.sampled_from(["deepcopy", "file", torch.float16, torch.bfloat16]), go_on=st.booleans())
    def make_a_copy(self, how, go_on):
        model, truth = copy.deepcopy(self.model), copy.deepcopy(self.truth)
        if how == "file":
            model = self.through_file(self.model)
        elif how != "deepcopy":
            model.to(how).float()
            truth.cast(how)
        check(model, truth)
        if go_on:
            self.truth, truth = truth, self.truth
            was = self.model
            self.go_on_with(model)
            model = was
        self.aside.append((model, truth))

    @rule(go_on=st.booleans())
    def take_the_average(self, go_on):
        """The average has the latest masks, and the mean of the weights in memory."""
        if self.average is None:
            self.average, self.seen = AveragedModel(self.model), []
        self.average.update_parameters(self.model)
        self.seen.append(truth_of(self.model))
        mean = truth_of(self.average.module, self.truth.masks)
        for i, kept in enumerate(self.truth.masks):
            expected = np.where(kept, np.mean([was.weights[i] for was in self.seen], axis=0), 0)
            np.testing.assert_allclose(mean.weights[i], expected, rtol=1e-5, atol=1e-6)
        check(self.average.module, mean)
        if go_on:
            self.truth = mean
            for layer in sparse_layers(self.average.module).values():
                layer.zero_masked()  # the mean of the weights in memory is not zero under a mask that came later
            self.go_on_with(self.average.module)

    @rule(form=st.sampled_from(FORMS), through_file=st.booleans())
    def export(self, form, through_file):
        exported = sparsify.export(self.model, format=form)
        if through_file:
            exported = self.through_file(exported)
        check(exported, self.truth)
        self.aside.append((exported, copy.deepcopy(self.truth)))

    @rule(form=st.sampled_from([None, *FORMS]), from_zeros=st.booleans())
    def make_dense_and_convert(self, form, from_zeros):
        """Dense again, directly or from an export, the weights are the same; zeros alone tell what was masked."""
        dense = sparsify.to_dense(self.model if form is None else sparsify.export(self.model, format=form))
        check(dense, self.truth)
        self.go_on_with(sparsify.convert(dense))
        if from_zeros:
            sparsify.masks_from_zeros(self.model)
        self.truth.set_masks([w != 0 if from_zeros else np.ones_like(w, bool) for w in self.truth.weights])

    @invariant()
    def agrees(self):
        if hasattr(self, "truth"):
            check(self.model, self.truth)

    def teardown(self):
        if hasattr(self, "folder"):
            with self.folder:
                for model, truth in self.aside:
                    check(model, truth)


TestSequences = pytest.mark.usefixtures("one_thread")(Sequences.TestCase)
TestSequences.settings = settings(repeatable, max_examples=N_SEQUENCES, stateful_step_count=N_STEPS, database=None)

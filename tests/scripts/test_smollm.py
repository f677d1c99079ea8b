"""A real language model, from its GGUF to the perplexity of its text."""

import math

import assets
import pytest
import torch
from torch import nn

from sparsify.conversion.convert import plan_convert

for name in ("smollm2", "brown"):
    if assets.missing_files(name):
        pytest.skip(
            f".assets/{name} is missing: {assets.PACKAGES[name].requirement} was not fetched; run scripts/assets.py",
            allow_module_level=True,
        )
for package in ("transformers", "gguf"):
    pytest.importorskip(package, reason=f"{package} is missing: pip install 'sparsify-torch[test]'")

from pretrained import smollm  # noqa: E402


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The model; no test changes it."""
    return smollm.load_dense()


def test_the_model_predicts_text_as_well_as_it_is_known_to(model: nn.Module) -> None:
    """Wrong rotary pairs, a wrong base or another tokenizer cost far more than the tolerance."""
    assert smollm.perplexity(model, n_contexts=2) == pytest.approx(51.849, rel=1e-3)


def test_the_blocks_have_210_linears_and_the_head_is_tied(model: nn.Module) -> None:
    plan = plan_convert(model, include=smollm.BLOCK_LAYERS)
    assert len(plan.swap) == 210
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_calibration_and_evaluation_share_no_file() -> None:
    assert not set(smollm.CALIBRATION_FILES) & {*smollm.EVALUATION_FILES, *smollm.OTHER_FILES}
    batches = smollm.calibration()
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (64, smollm.CONTEXT)
    assert len({tuple(row.tolist()) for row in ids}) == 64
    assert math.ceil(64 / 8) == len(batches)

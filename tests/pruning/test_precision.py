"""bfloat16 in the passes of a training: products, and attention."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsify
from sparsify.pruning import precision
from sparsify.pruning.precision import check_bfloat16, computing

CPU = torch.device("cpu")


#: A rounding to bfloat16 changes a number by this share at most.
U = 2.0**-9


def attention_and_bound(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object
) -> tuple[torch.Tensor, float]:
    """Return the answer in float64, and the largest error that roundings to bfloat16 can make of it.

    Of a score two roundings: of the scaled query and of the sum of products (in float32), and one more for a mask. A
    change of all scores by d changes a share by exp(2 d) at most. Shares and the answer are rounded too.
    """
    q, k, v = (part.detach().double() for part in (q, k, v))
    mask = options.pop("attn_mask", None)
    wide = mask.double() if isinstance(mask, torch.Tensor) and mask.dtype != torch.bool else mask
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=wide, **options)  # type: ignore[arg-type]
    alike = q.shape[1] // k.shape[1]
    sizes = q.abs() @ k.abs().repeat_interleave(alike, 1).transpose(-2, -1)
    scale = options.get("scale") or q.shape[-1] ** -0.5
    of_mask = 0.0 if wide is None or wide.dtype == torch.bool else float(wide[wide.isfinite()].abs().max())
    of_score = 3.1 * U * (float(sizes.max()) * float(scale) + of_mask)  # type: ignore[arg-type]
    return wanted, (math.expm1(2 * of_score) + 2.1 * U) * float(v.abs().max())


@pytest.mark.parametrize("tokens", [1, 129, 1023])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.bfloat16])
def test_attention_of_short_sequences(tokens: int, named: bool, masked: torch.dtype | None) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(1, 2, n, 4, dtype=torch.bfloat16) for n in (3, tokens, tokens)]
    mask = None if masked is None else torch.ones(3, tokens, dtype=masked)
    if mask is not None and masked == torch.bool:
        mask[1, 1:] = False
    elif mask is not None:
        mask[1, 1:] = -math.inf
    with computing(CPU, bfloat16=True):
        if named:
            names = dict(zip(("query", "key", "value"), parts, strict=True))
            found = F.scaled_dot_product_attention(**names, attn_mask=mask)
        else:
            found = F.scaled_dot_product_attention(*parts, mask)
    assert found.dtype == torch.bfloat16
    wanted, bound = attention_and_bound(*parts, attn_mask=mask)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.25}, {"enable_gqa": True}, {"dropout_p": 0.0}])
def test_options_of_attention(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    n_heads = 2 if "enable_gqa" in options else 4
    parts = [torch.randn(2, n, 9, 8, dtype=torch.bfloat16).requires_grad_() for n in (4, n_heads, n_heads)]
    with computing(CPU, bfloat16=True):
        found = F.scaled_dot_product_attention(*parts, **options)  # type: ignore[arg-type]
    wanted, bound = attention_and_bound(*parts, **options)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)
    exact = [part.detach().double().requires_grad_() for part in parts]
    answer = F.scaled_dot_product_attention(*exact, **options)  # type: ignore[arg-type]
    rights = torch.autograd.grad(answer.square().sum(), exact)
    for gradient, right in zip(torch.autograd.grad(found.square().sum(), parts), rights, strict=True):
        # Eight roundings: of query, scores, shares, answer, and of the gradients of each; a factor 2 for their spread.
        assert float((gradient - right).norm()) < 2 * 8 * U * float(right.norm())


def test_dropout_of_attention_and_rows_that_see_nothing_are_torchs() -> None:
    torch.manual_seed(0)
    x, nothing = torch.randn(1, 2, 8, 4), torch.ones(8, 8, dtype=torch.bool)
    nothing[3] = False
    for options in ({"attn_mask": nothing}, {"attn_mask": torch.zeros(8, 8).masked_fill(~nothing, -math.inf)}):
        with computing(CPU, bfloat16=True):
            found = F.scaled_dot_product_attention(x, x, x, **options)
        assert torch.equal(found[:, :, 3], torch.zeros(1, 2, 4))
    with computing(CPU, bfloat16=True):
        dropped = F.scaled_dot_product_attention(x, x, x, dropout_p=0.999)
        with pytest.raises(RuntimeError, match="causal"):
            F.scaled_dot_product_attention(x, x, x, nothing, is_causal=True)
    assert bool((dropped == 0).any())


def test_attention_without_a_backward_pass_is_in_bfloat16() -> None:
    x = torch.randn(1, 2, 8, 4)
    with computing(CPU, bfloat16=True), torch.no_grad():
        assert F.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16


def test_attention_of_long_sequences_and_products_are_in_bfloat16() -> None:
    x, weight = torch.ones(1, 1, 1024, 4), torch.ones(3, 4)
    with computing(CPU, bfloat16=True):
        assert F.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16
        assert F.linear(x, weight).dtype == torch.bfloat16
    assert F.linear(x, weight).dtype == torch.float32


def test_all_is_in_float32_if_not_asked_for() -> None:
    x = torch.ones(1, 1, 8, 4)
    with computing(CPU, bfloat16=False):
        assert F.linear(x, torch.ones(3, 4)).dtype == torch.float32
        assert F.scaled_dot_product_attention(x, x, x).dtype == torch.float32


@pytest.mark.parametrize("has_kernel", [True, False])
def test_an_lstm_runs_where_torch_has_no_bfloat16_for_it(monkeypatch: pytest.MonkeyPatch, has_kernel: bool) -> None:
    if has_kernel and not precision._has_bfloat16_lstm():
        pytest.skip("torch has no bfloat16 LSTM on this processor")
    monkeypatch.setattr(precision, "_has_bfloat16_lstm", lambda: has_kernel)
    torch.manual_seed(0)
    lstm, head, x = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4), torch.randn(2, 5, 8)
    wanted, (wanted_hidden, _) = lstm(x if has_kernel else x.bfloat16().float())
    with computing(CPU, bfloat16=True):
        found, (hidden, _) = lstm(x if has_kernel else x.bfloat16())
        out = head(found)
    assert out.dtype == torch.bfloat16
    assert found.dtype == (torch.bfloat16 if has_kernel else torch.float32)
    # In bfloat16 the inputs and weights of 5 steps are rounded to 8 bits; in float32 only x was, before.
    atol = 0.05 if has_kernel else 0
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=atol)
    torch.testing.assert_close(hidden.float(), wanted_hidden, rtol=0, atol=atol)
    out.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in lstm.parameters())


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_processor_without_instructions_is_told_of(monkeypatch: pytest.MonkeyPatch, has_instructions: bool) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: has_instructions)
    layers = {"up": sparsify.SparseLinear(8, 4, 0.5)}
    if has_instructions:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_bfloat16(layers)
    else:
        with pytest.warns(sparsify.SlowBfloat16Warning, match="leave it out"):
            check_bfloat16(layers)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    check_bfloat16(layers)  # elsewhere than on the CPU its instructions do not matter


def test_recover_tells_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    model = sparsify.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    teacher, data = copy.deepcopy(model), [torch.randn(16, 8)]
    sparsify.prune(model, 0.5)
    with pytest.warns(sparsify.SlowBfloat16Warning):
        sparsify.recover(model, teacher, data, steps=1, bfloat16=True)
